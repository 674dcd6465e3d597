"""A study refuses what its model could not be trained with, before any text is read."""

from __future__ import annotations

import pytest

from earlyexit.study import Study


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        ({"tokenizer": "bpe"}, "output_head='linear'"),
        ({"bf16": True}, "bf16=false"),
    ],
)
def test_an_adaptive_head_is_refused_where_it_cannot_train(overrides, remedy):
    study = Study("01_build", "smoke", device="cpu", overrides=overrides)
    with pytest.raises(ValueError, match=remedy):
        study.model_config()
