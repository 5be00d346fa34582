"""What a rank imports, in the server that ranks on CPU are forked from: importing takes longer than most of their runs."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""                    # as Ray has it for a worker without GPUs; CUDA does not live through a fork

import distlm  # noqa: I001                                # first: it quiets what transformers imports
import deepspeed.runtime.zero.muon.muon_optimizer          # as every engine does, and torch's compiler with it
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import pandas  # noqa: F401                                # as pyarrow does
import tiktoken  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import distlm.train.loop  # noqa: F401
