"""What every test needs before anything is imported: no downloads, no usage reports, one thread a process."""

import os

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
