"""The Transformer: built from a preset, a configuration or a checkpoint; its loss; its export."""

from distlm.model.build import Shape, build_model, model_config
from distlm.model.loss import CausalLoss

__all__ = ["CausalLoss", "Shape", "build_model", "model_config"]
