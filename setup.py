"Everything setuptools needs is in `settings.ini`; this file only reads it."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {name: shlex.split(cfg[f'{name}_requirements']) for name in ('soundfont', 'gpus', 'sweep', 'explore', 'voice', 'intervals', 'dev', 'docs')}
readme = Path('README.md')
classifiers = ['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
               'Natural Language :: English', *(f'Programming Language :: Python :: 3.{minor}' for minor in (10, 11, 12))]

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0', classifiers=classifiers, keywords=cfg['keywords'].split(),
      packages=[*find_packages(include=['disentangle_nb', 'disentangle_nb.*']), 'disentangle_nb.weights'],
      package_dir={'disentangle_nb.weights': 'data/weights'},
      package_data={'disentangle_nb.weights': ['*/*.json', '*/*.safetensors', '*.md']},
      python_requires=f">={cfg['min_python']}", install_requires=shlex.split(cfg['requirements']), extras_require=extras,
      entry_points={'console_scripts': shlex.split(cfg['console_scripts']), 'nbdev': ['disentangle_nb=disentangle_nb._modidx:d']},
      long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown')
