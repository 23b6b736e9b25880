"The core notebooks run top to bottom, as nbdev_test runs them; their examples assert. The others are in slow/."

import pytest
from conftest import ROOT, run_notebook


@pytest.mark.parametrize('path', sorted(ROOT.glob('nbs/[0-9]*.ipynb')), ids=lambda p: p.stem)
def test_notebook(path):
    run_notebook(path)
