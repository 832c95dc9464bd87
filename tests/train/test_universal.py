"""What a universal checkpoint leaves in AdamW's state."""

import torch

from qwen2vl_train.training.universal import separate_steps


def test_each_parameter_has_a_step_of_its_own_on_its_own_device():
    """As DeepSpeed loads them: one tensor on the host for all; `meta` stands in for a GPU."""
    parameters = [torch.nn.Parameter(torch.empty(3, device=device)) for device in ("cpu", "cpu", "meta")]
    optimizer = torch.optim.AdamW(parameters)
    loaded = torch.tensor(7.0)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = loaded
    separate_steps(optimizer)
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [step.device for step in steps] == [parameter.device for parameter in parameters]
    steps[0] += 1
    assert (float(loaded), float(steps[1])) == (7, 7)
