"Regenerate everything that is generated and say what changed: modules, clean notebooks, sidebar, README. Exit 1 if any did."
import hashlib, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
watched = ['disentangle_nb/**/*.py', 'nbs/*.ipynb', 'nbs/*.yml', 'pyproject.toml', 'README.md', 'docs/readme/*.png']


def snapshot():
    files = (p for pattern in watched for p in root.glob(pattern))
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def regenerate(): # one process for all: starting Python and nbdev costs more than the work
    from nbdev.doclinks import nbdev_export
    from nbdev.clean import nbdev_clean
    nbdev_export()
    nbdev_clean()


def main():
    before = snapshot()
    regenerate()
    for tool in ('contents.py', 'readme.py'): subprocess.run([sys.executable, root/'tools'/tool], cwd=root, check=True)
    after = snapshot()
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    for f in changed: print(f'drift: {f} was not what its notebook (or settings.ini) says; it is now: look at it and commit it')
    if not changed: print(f'no drift in {len(after)} generated or cleaned files')
    return bool(changed)


if __name__ == '__main__': sys.exit(main())
