"A run of the hub: which files are asked for, what is refused. The upload is tested in nbs/appendix/hub.ipynb."

import shutil
import huggingface_hub
import pytest
from slotnb import hub
from slotnb.core import SlotnbError, read_json, write_json
from slotnb.evaluate import load_run
from slotnb.runs import shipped
from slotnb.runs.checkpoints import SHIPPED, checkpoint_path, load_tensors
from slotnb.runs.verify import write_sealed


@pytest.fixture
def fake(monkeypatch, tmp_path):
    "The hub holds the shipped model. Returns its folder, to be changed, and the calls."
    folder, calls = tmp_path / 'snapshot', []
    shutil.copytree(SHIPPED / 'movi_a', folder)

    def download(repo, **kwargs):
        calls.append((repo, kwargs))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    return folder, calls


def test_a_run_of_the_hub_is_read_like_a_folder(fake):
    folder, calls = fake
    ours = load_run('movi_a').model.state_dict()
    for name in ('hf://somebody/movi', 'hf://somebody/movi@v1'):
        theirs = load_run(name).model.state_dict()
        assert all(ours[k].equal(theirs[k]) for k in ours)
    assert [(repo, kwargs['revision']) for repo, kwargs in calls] == [('somebody/movi', None), ('somebody/movi', 'v1')]
    files = ['best_model.safetensors', 'config.json', 'probe.safetensors', 'README.md']
    assert all(kwargs['allow_patterns'] == files for _, kwargs in calls)  # no code, no pickle
    assert hub.from_pretrained('somebody/movi').config == load_run(SHIPPED / 'movi_a').config


def test_a_run_of_the_hub_imports_no_code(fake):
    folder, _ = fake
    about = read_json(folder / 'config.json')
    about.pop('digest', None)
    about['config']['decoder'] = 'somebody.decoders:Gated'
    write_json(folder / 'config.json', about)
    with pytest.raises(SlotnbError, match="imports the module 'somebody.decoders'.*trust=True"):
        load_run('hf://somebody/movi')
    with pytest.raises(SlotnbError, match='no module'):  # trusted, and not there
        load_run('hf://somebody/movi', trust=True)


def test_no_path_of_this_machine_is_published(tmp_path, monkeypatch):
    run = tmp_path / 'run'
    shutil.copytree(SHIPPED / 'movi_a', run)
    about = read_json(run / 'config.json')
    about.pop('digest', None)
    about['config'] |= dict(weights='/home/me/vit.pth', warm_start='/home/me/before', data_dir='/home/me/photos')
    write_json(run / 'config.json', about)
    write_sealed(run / 'result.json', {}, ('best_model.safetensors',))
    monkeypatch.setattr(hub, 'frozen_backbone', lambda config: None)
    monkeypatch.setattr(shipped, 'check_features', lambda *_: None)
    monkeypatch.setattr(shipped, 'probe_features', lambda _: load_tensors(run / 'probe.safetensors')[0]['feats'])
    folder = hub.save_pretrained(run, tmp_path / 'model')
    text = ''.join((folder / name).read_text() for name in ('config.json', 'README.md'))
    assert '/home/me' not in text and '`warm_start`: before' in text and 'data: photos' in text
    assert load_run(folder).config.weights == 'auto'


def test_what_the_hub_refuses_is_one_sentence(fake, monkeypatch):
    folder, _ = fake
    for wrong in ('hf://movi', 'hf://a/b/c', 'hf://a/b c'):
        with pytest.raises(SlotnbError, match='is no model of the hub; write hf://owner/name'):
            checkpoint_path(wrong)
    (folder / 'config.json').unlink()
    with pytest.raises(SlotnbError, match='holds no run of slotnb .config.json is missing'):
        load_run('hf://somebody/movi')

    def no_network(*_, **__):
        raise OSError('no route to host\nat all')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', no_network)
    with pytest.raises(
        SlotnbError, match=r"'hf://somebody/movi' cannot be downloaded .OSError: no route to host at all"
    ):
        load_run('hf://somebody/movi')
    monkeypatch.setattr(hub, 'save_pretrained', lambda *_: folder)

    class Api:
        create_repo = no_network

    with pytest.raises(SlotnbError, match="repo 'somebody/movi' cannot be written .OSError"):
        hub.push_to_hub('run', 'somebody/movi', api=Api())
