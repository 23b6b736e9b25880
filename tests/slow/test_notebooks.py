"The notebooks beside the core, the guides and the run notebook, as nbdev_test runs them."

import shutil
import pytest
from conftest import ROOT, run_notebook

NOTEBOOKS = [
    *ROOT.glob('nbs/*/[!_]*.ipynb'),
    *ROOT.glob('nbs/[!_0-9]*.ipynb'),
    *ROOT.glob('guides/[!_]*.ipynb'),
    ROOT / 'reports/backbone_run.ipynb',
]


@pytest.mark.parametrize('path', sorted(NOTEBOOKS), ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_notebook(path):
    if path.stem == 'backbone_run':
        shutil.rmtree(ROOT / 'reports/_build/try_out', ignore_errors=True)
    run_notebook(path)
