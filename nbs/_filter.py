"Quarto's ipynb filter: nbdev's directives and cross links, for notebooks that stand one folder deep."
import io, os, sys
from contextlib import redirect_stdout
from json import loads
from pathlib import Path


def main():
    text = sys.stdin.read()
    if '_proc' in Path.cwd().parts: return print(text, end='') # nbdev has been over these already
    os.environ['IN_TEST'] = '1'
    from execnb.nbio import dict2nb, nb2str
    from nbdev.processors import FilterDefaults
    nb = dict2nb(loads(text))
    nb.path_ = Path.cwd()/'notebook.ipynb'
    with redirect_stdout(io.StringIO()): FilterDefaults()(nb) # what processors print must not get into the notebook
    print(nb2str(nb), end='')


if __name__=='__main__': main()
