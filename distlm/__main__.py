"""`python -m distlm` is `distlm`."""

from distlm.cli import main

if __name__ == "__main__":
    main()
