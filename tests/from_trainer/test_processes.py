"""mask_trainer in several processes."""

from pathlib import Path

import pytest

from fish_tuning import FishConfig, get_mask, mask_trainer
from fish_tuning.from_trainer.masking import score_trainer
from tests.from_trainer.trainers import ALL, Weighted, dpo, kto, plain
from tests.models import assert_scores_close
from tests.processes import in_processes
from tests.training import assert_trained_where_selected, tensors_of, trainable

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

TRAINERS = {
    "plain": plain,
    "subclass": lambda folder: plain(folder, Weighted),
    "dpo": dpo,
    "kto": kto,
}


def scored_and_trained(rank, name, folder):
    trainer = TRAINERS[name](Path(folder, str(rank)))
    before = tensors_of(trainer.model, trainable(trainer.model))
    # A number of examples that two processes cannot share equally.
    config = ALL.model_copy(update={"num_samples": 5})
    _, scores = score_trainer(trainer, config, progress=False)
    mask = mask_trainer(trainer, FishConfig(keep_ratio=0.3, num_samples=5), progress=False)
    trainer.train()
    assert_trained_where_selected(trainer.model, mask, before)
    return dict(scores), dict(get_mask(trainer.model))


@pytest.mark.parametrize("name", TRAINERS)
def test_processes_score_the_same_examples(name, tmp_path):
    """Guards losses that gather, and processes that draw or select for themselves."""
    config = ALL.model_copy(update={"num_samples": 5})
    _, expected = score_trainer(TRAINERS[name](tmp_path / "alone"), config, progress=False)
    results = in_processes(2, tmp_path / "meet", scored_and_trained, name, str(tmp_path))
    for scores, mask in results:
        assert_scores_close(scores, expected, rtol=1e-4)
        assert all((mask[tensor] == bits).all() for tensor, bits in results[0][1].items())
