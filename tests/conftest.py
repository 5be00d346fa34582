"""What every test needs before anything is imported: no downloads, no usage reports, one thread a process, Ray as distlm starts it."""

import os

from distlm.head import RAY_SETTINGS

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **RAY_SETTINGS}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
