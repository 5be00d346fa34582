"""distlm: from raw text to a served language model, with one YAML spec per job, on Ray and DeepSpeed."""

__version__ = "0.1.0"
