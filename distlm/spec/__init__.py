"""Specs: one YAML file per job, validated before any work.

    spec = load_spec("jobs/quickstart.yaml", overrides=["seed=1"]).spec
"""

from distlm.spec.average import AverageSpec
from distlm.spec.compress import CompressSpec
from distlm.spec.evaluate import EvaluateSpec
from distlm.spec.load import KINDS, Loaded, Spec, load_spec
from distlm.spec.pipeline import PipelineSpec
from distlm.spec.prepare import PrepareSpec
from distlm.spec.serve import ServeSpec
from distlm.spec.train import TrainSpec
from distlm.spec.tune import TuneSpec

__all__ = ["KINDS", "AverageSpec", "CompressSpec", "EvaluateSpec", "Loaded", "PipelineSpec", "PrepareSpec", "ServeSpec", "Spec",
           "TrainSpec", "TuneSpec",
           "load_spec"]
