"Resuming after SIGKILL with more settings than in tests/test_train.py."

import pytest
from test_train import check_resume


SETTINGS = dict(engine='fast'), dict(engine='fast', decoder='mlp'), dict(engine='torch', normalizer='dataset')


@pytest.mark.parametrize('settings', SETTINGS)
def test_sigkill_and_resume_equals_uninterrupted(tmp_path, few_scenes, settings):
    check_resume(tmp_path, few_scenes, settings)
