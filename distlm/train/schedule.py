"""The learning rate as a pure function of the step."""

import math

from distlm.spec.optimizer import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of `num_steps`. The warm-up counts steps (`Schedule.in_steps`).

    With s the step counted from 1, w the warm-up, n all steps, m min_ratio, x = (s - 1 - w) / (n - 1 - w), 0 to 1 after the warm-up, the
    rate over the peak is

        warm-up       s / w                             as long as s <= w (Goyal et al. 2017, section 2.2)
        constant      1
        linear        1 - (1 - m) x
        cosine        m + (1 - m) (1 + cos(pi x)) / 2   Loshchilov and Hutter 2017, equation 5, without restarts
        inverse_sqrt  sqrt(max(w, 1) / s)               Vaswani et al. 2017, equation 3, over its peak
        wsd           m + (1 - m) (n - s + 1) / d       in the last d = decay_fraction n steps, 1 before (Hu et al. 2024)
    """
    warmup, floor = schedule.warmup_steps, schedule.min_ratio
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(warmup, 1) / (step + 1))
    if schedule.name == "wsd":
        decay_steps = max(1, round(schedule.decay_fraction * num_steps))
        left = num_steps - step
        return peak if left > decay_steps else peak * (floor + (1 - floor) * left / decay_steps)
    done = (step - warmup) / max(1, num_steps - 1 - warmup)
    done = min(1.0, done)
    if schedule.name == "linear":
        return peak * (1 - (1 - floor) * done)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
