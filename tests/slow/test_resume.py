"Resuming after SIGKILL with more settings than in tests/test_train.py."

import pytest
from test_train import check_resume


@pytest.mark.parametrize('settings', [dict(normalizer='dataset', engine='torch'), dict(engine='fast', decoder='mlp')])
def test_sigkill_and_resume_equals_uninterrupted(tmp_path, few_scenes, settings):
    check_resume(tmp_path, few_scenes, settings)
