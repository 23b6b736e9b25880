"Everything is read from settings.ini, as nbdev 2 has it."

from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parent / 'settings.ini')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
extras['all'] = sorted({r for rs in extras.values() for r in rs})


class BuildWithNotebooks(build_py):
    "Packs the notebooks that `slotnb sweep` and `slotnb report` execute: slotnb.runs.notebooks."

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ('backbone_run', 'ta_report', 'unlabeled_report'):
                self.mkpath(f'{self.build_lib}/slotnb/notebooks')
                self.copy_file(f'reports/{name}.ipynb', f'{self.build_lib}/slotnb/notebooks/{name}.ipynb')


setup(
    cmdclass=dict(build_py=BuildWithNotebooks),
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    license='Apache-2.0',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    keywords=cfg['keywords'],
    long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['slotnb*']),
    package_data={
        'slotnb': [
            'fast/src/*.cpp',
            'fast/src/*.h',
            'explorer/*.js',
            'explorer/*.css',
            'explorer/*.j2',
            'runs/models/*/*',
        ]
    },
    zip_safe=False,
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
    ],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points=dict(
        console_scripts=[cfg['console_scripts']], nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]
    ),
)
