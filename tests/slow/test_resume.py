"Resuming after SIGKILL with engine fast, as tests/test_train.py does with the default engine."

import pytest
from test_train import check_resume


@pytest.mark.parametrize('settings', [dict(normalizer='dataset'), dict(decoder='mlp')])
def test_sigkill_and_resume_equals_uninterrupted(tmp_path, few_scenes, settings):
    check_resume(tmp_path, few_scenes, settings | dict(engine='fast'))
