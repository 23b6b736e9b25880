"Every notebook runs top to bottom, as nbdev_test does it; their examples are asserts."

import shutil
import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    'path',
    sorted([*ROOT.glob('nbs/[!_]*.ipynb'), *ROOT.glob('guides/[!_]*.ipynb'), ROOT / 'reports/backbone_run.ipynb']),
    ids=lambda p: p.stem,
)
def test_notebook(path):
    from nbdev.test import test_nb

    if path.stem == '25_fused':
        from slotnb.fused import fused_obstacle

        if why := fused_obstacle([]):
            pytest.skip(why)
    if path.stem == 'backbone_run':
        shutil.rmtree(ROOT / 'reports/_build/try_out', ignore_errors=True)
    ok, seconds = test_nb(path, basepath=ROOT, showerr=True)
    assert ok, f'{path.name} fails; see the traceback above'
