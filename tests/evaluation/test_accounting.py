"""The rows of Tables 6 and 7 from the rules."""

from __future__ import annotations

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import accounting


def test_table_6() -> None:
    paper = {50_000: 78.6, 100_000: 80.3, 200_000: 83.8, 500_000: 94.3, 1_000_000: 111.8}
    for pairs, millions in paper.items():
        # 50,000 pairs give 78.55 exactly, which the paper rounds up.
        assert accounting.table6(pairs).paper / 1e6 == pytest.approx(millions, abs=0.0501)
    assert accounting.heun_evaluations(18) == accounting.TABLE6_PER_PAIR == 35


def test_consistency_distillation_counts_two_of_four() -> None:
    counted = accounting.consistency_distillation()
    assert counted.by_role["student"] + counted.by_role["target"] == 819_200_000
    assert counted.all == 1_638_400_000


def test_table_7_leaves_instaflows_data_out() -> None:
    without = [stage.name for stage in accounting.INSTAFLOW if stage.name != "data"]
    assert accounting.gpu_days(accounting.INSTAFLOW, without) == pytest.approx(183.2)
    assert accounting.gpu_days(accounting.INSTAFLOW) == pytest.approx(199.2)
    # 20,000 iterations of 256 at 127.5 images a second on 8 GPUs.
    training = accounting.Stage("training", 8, 20_000 * 256 / 127.5 / 3600)
    assert accounting.gpu_days([training]) == pytest.approx(3.72, abs=0.005)


def test_what_does_not_add_up_is_refused() -> None:
    with pytest.raises(UserError, match="days do not add up"):
        accounting.gpu_days([accounting.Stage("a", 1, 1), accounting.Stage("b", 1, 1, "H100")])
    with pytest.raises(UserError, match="no stage 'c'"):
        accounting.gpu_days([accounting.Stage("a", 1, 1)], ["c"])
    with pytest.raises(UserError, match="role 'critic'"):
        accounting.Evaluations().add("critic", 1)
