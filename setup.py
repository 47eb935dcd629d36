("Everything is read from settings.ini; "
 "requirements stand there one a line, so that environment markers keep their spaces.")
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lines = lambda key: [l.strip() for l in cfg[key].splitlines() if l.strip()]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_path']: ['*.mplstyle']},
    python_requires='>=' + cfg['min_python'], install_requires=lines('requirements'),
    extras_require=dict(dev=lines('dev_requirements')),
    entry_points=dict(console_scripts=lines('console_scripts'),
                      nbdev=[f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]),
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Natural Language :: English']
                + [f'Programming Language :: Python :: 3.{v}' for v in range(10, 14)],)
