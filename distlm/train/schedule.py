"""The learning rate as a pure function of the step."""

import math

from distlm.spec.train import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of `num_steps`.

    Warm-up is linear and reaches the peak at its last step. cosine: Loshchilov and Hutter 2017, equation 5, without restarts;
    wsd (warm-up, stable, decay): Hu et al. 2024, with linear decay over the last `decay_fraction` of all steps.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_ratio
    if schedule.name == "constant":
        return peak
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay_fraction * num_steps))
        left = num_steps - step
        return peak if left > decay_steps else peak * (floor + (1 - floor) * left / decay_steps)
    done = (step - schedule.warmup_steps) / max(1, num_steps - 1 - schedule.warmup_steps)
    done = min(1.0, done)
    if schedule.name == "linear":
        return peak * (1 - (1 - floor) * done)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
