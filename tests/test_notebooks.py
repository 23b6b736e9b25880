"The core notebooks run top to bottom, as nbdev_test runs them; their examples assert. The others are in slow/."

import pytest
from conftest import ROOT, run_notebook


LONG = '02_backbones', '03_features', '04_normalizer', '06_decoder', '13_train', '14_evaluate'


def core_notebooks():
    for path in sorted(ROOT.glob('nbs/[0-9]*.ipynb')):
        yield pytest.param(path, id=path.stem, marks=[pytest.mark.long] if path.stem in LONG else [])


@pytest.mark.parametrize('path', core_notebooks())
def test_notebook(path):
    run_notebook(path)
