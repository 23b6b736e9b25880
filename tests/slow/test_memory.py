"Memory of training and evaluation does not grow with the number of scenes."

import sys
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
import scale

TINY = dict(slot_dim=16, hidden_dim=16, num_slots=3, num_iters=1, batch_size=30, num_epochs=1)


def test_memory_is_flat_in_scenes():
    """290 scenes more are 114 MB of features: neither training nor evaluating takes a quarter of that when nothing is
    kept; a run that keeps them is seen to."""
    r = scale.scale_scenes((60, 350), TINY, in_memory=0, threads=1)
    kept = scale.scale_scenes((60, 350), TINY, in_memory=10**9, threads=1)

    def growth(r, key='train_mb'):
        return r[key][1] - r[key][0]

    more = growth(r, 'features_mb')
    assert growth(r) < more / 4 and growth(r, 'evaluate_mb') < more / 4 and growth(kept) > more / 2, (r, kept)
