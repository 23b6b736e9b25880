"""`make docs`: the site in `_docs`, built by Quarto where it is installed and by smalldocs where it is not.
As with nbdev, every notebook is first filtered into `_proc`, and both builders read that folder.
Then every link, anchor and picture is checked."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote, urlsplit
import yaml
from bs4 import BeautifulSoup

sys.path.insert(0, str(Path(__file__).parent))  # for the worker processes too
from _filter import write_for_readers

ROOT = Path(__file__).parent.parent
INSTALL = '''Quarto is not installed, so smalldocs builds the pages: the same text and pictures as plain HTML.
The published site is built by Quarto; to build it here, install Quarto: https://quarto.org/docs/get-started/'''


def hrefs(entries):
    for e in entries:
        if isinstance(e, str):
            yield e
        else:
            yield from hrefs([e['href']] if 'href' in e else [])
            yield from hrefs(e.get('contents', []))


def sources(root):
    "The pages in the order of reading: the sidebar of `_quarto.yml` is the one list of them."
    sidebar = yaml.safe_load((root / '_quarto.yml').read_text())['website']['sidebar']
    return [root / h for h in hrefs(sidebar['contents'])]


def filter_pages(root):
    "Filter every notebook whose copy in `_proc` is older than the notebook or the package; returns `_proc`."
    proc, todo, pages = root / '_proc', [], sources(root)
    copies = [proc / p.relative_to(root) for p in pages]
    if set(proc.rglob('*.ipynb')) != {p for p in copies if p.suffix == '.ipynb'}:
        shutil.rmtree(proc, ignore_errors=True)  # links depend on the names of all notebooks
    proc.mkdir(exist_ok=True)
    newest = max(
        p.stat().st_mtime for p in (root / 'settings.ini', *root.glob('slotnb/**/*.py'), *root.glob('nbs/_*.py'))
    )
    for p, copy in zip(pages, copies):
        if copy.exists() and copy.stat().st_mtime > max(newest, p.stat().st_mtime):
            continue
        if p.suffix == '.ipynb':
            todo.append((p, copy))
        else:
            shutil.copy(p, copy)
    with ProcessPoolExecutor(mp_context=get_context('spawn')) as pool:
        list(pool.map(write_for_readers, *zip(*todo))) if todo else None
    for name in ('_quarto.yml', 'nbs/styles.css'):
        shutil.copy(root / name, proc / name)
    return proc


def build_with_quarto(root, out):
    proc = filter_pages(root)
    subprocess.run(['quarto', 'render', str(proc)], check=True, env=os.environ | {'QUARTO_PYTHON': sys.executable})
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc / '_docs', out)


def build_without_quarto(root, out):
    from smalldocs.config import load
    from smalldocs.site import Site

    site = Site(load(filter_pages(root)), quiet=True)
    shutil.rmtree(out, ignore_errors=True)
    site.out = out
    site.build()


def front_door(out):
    "The address of the site's folder leads to its home page."
    if not (out / 'index.html').exists():
        (out / 'index.html').write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>slotnb</title>'
            '<meta http-equiv="refresh" content="0; url=nbs/index.html"></head>'
            '<body><a href="nbs/index.html">slotnb</a></body></html>\n'
        )


def check(
    out,  # folder of a built site
    root=ROOT,  # the repository, for links into its sources
):  # one sentence for each thing that is wrong
    "Check every link inside the site, every anchor, every picture and its alt text; no directive, no local path."
    pages = {
        p.relative_to(out).as_posix(): BeautifulSoup(p.read_text(), 'html.parser')
        for p in sorted(out.rglob('*.html'))
        if 'site_libs' not in p.parts
    }
    anchors = {
        name: {e['id'] for e in page.find_all(id=True)} | {e['name'] for e in page.find_all('a', attrs={'name': True})}
        for name, page in pages.items()
    }
    ini = dict(re.findall(r'^(\w+) *= *(.*)$', (root / 'settings.ini').read_text(), re.M))
    published, blob = ini['doc_host'] + ini['doc_baseurl'], f"{ini['git_url']}/blob/{ini['branch']}/"
    problems = []
    for p in sources(root):
        if (page := p.relative_to(root).with_suffix('.html').as_posix()) not in pages:
            problems.append(f'{page} is missing')
    for name, page in pages.items():

        def wrong(what):
            problems.append(f'{name}: {what}')

        for tag, attr in (
            ('a', 'href'),
            ('link', 'href'),
            ('img', 'src'),
            ('script', 'src'),
            ('source', 'src'),
            ('iframe', 'src'),
        ):
            for e in page.find_all(tag, attrs={attr: True}):
                link = e[attr]
                url = urlsplit(link)
                if link.startswith(published) and 'canonical' not in e.get('rel', []):
                    wrong(f'{link} leads to the published site, not to this one')
                if link.startswith(blob):
                    file, line = (
                        root / unquote(url.path.split(f"/blob/{ini['branch']}/", 1)[1]),
                        url.fragment.removeprefix('L'),
                    )
                    if not file.is_file():
                        wrong(f'{link} leads to a source that is not there')
                    elif line and not (line.isdigit() and int(line) <= len(file.read_text().splitlines())):
                        wrong(f'{link} leads to a line that is not there')
                if url.scheme or url.netloc or not (url.path or url.fragment):
                    continue
                path = (
                    (
                        out / url.path.lstrip('/')
                        if url.path.startswith('/')
                        else out / Path(name).parent / unquote(url.path)
                    ).resolve()
                    if url.path
                    else out.resolve() / name
                )
                if path.is_dir():
                    path = path / 'index.html'
                if not path.is_file() or not path.is_relative_to(out.resolve()):
                    wrong(f'{link} leads nowhere')
                elif (
                    url.fragment
                    and path.suffix == '.html'
                    and unquote(url.fragment) not in anchors[path.relative_to(out.resolve()).as_posix()]
                ):
                    wrong(f'{link} names an anchor that is not there')
        body = page.find('main') or page
        for e in body.find_all(['img', 'svg']):
            if not (e.get('alt') or e.get('aria-label') or '').strip():
                wrong(f'a figure in {(e.find_parent(id=True) or {}).get("id")} has no alt text')
        for e in body.find_all(['pre', 'code']):
            if re.search(r'^\s*#\|', e.get_text(), re.M):
                wrong(f'a directive is shown raw: {e.get_text().strip()[:60]!r}')
            if found := re.search(r'<[^<>\n]* at 0x[0-9a-f]+>|\(\s*\*args, \*\*kwargs\s*\):\s*$', e.get_text()):
                wrong(f'says nothing to a reader: {" ".join(found[0].split())}')
        if found := re.search(r'(?<![\w.~/])/(home|root|tmp|work|workspace|Users|var/folders)/[\w.]+', body.get_text()):
            wrong(f'shows the path of a machine: {found[0]}')
    return problems


def main(out=ROOT / '_docs'):
    if shutil.which('quarto'):
        build_with_quarto(ROOT, out)
    else:
        print(INSTALL)
        build_without_quarto(ROOT, out)
    front_door(out)
    problems = check(out)
    print(*problems, f'{len(sources(ROOT))} pages in {out.name}/, {len(problems)} problems', sep='\n')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
