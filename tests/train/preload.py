"""What a rank imports, in the server that ranks on CPU are forked from: importing takes longer than most of their runs."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}            # CUDA is for no process that is forked

import deepspeed  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import distlm.train.loop  # noqa: F401
