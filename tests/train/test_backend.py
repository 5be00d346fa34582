"""What the ranks' backend keeps of Ray's own, and what it leaves out. tests/train/test_driver.py runs it."""

import subprocess
import sys

from ray.train.torch.config import _TorchBackend

from distlm.train.backend import RankBackend


def test_the_controller_which_loads_it_does_without_pytorch() -> None:
    code = "import sys, distlm.train.backend; print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_workers_of_a_node_see_its_gpus_as_ray_s_own_backend_has_them() -> None:
    assert RankBackend.share_cuda_visible_devices == _TorchBackend.share_cuda_visible_devices
