"Run notebooks in a real kernel and keep their outputs: `python tools/execute.py nbs/01_audio.ipynb ...` (all when none is named)."
import argparse, os, re, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
skip = re.compile(r'^#\s*\|\s*(eval:\s*false|slow|gpu|notest)|nbdev_export\(\)', re.M)


def execute(path, timeout):
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    kept = {i: c for i, c in enumerate(nb.cells) if c.cell_type == 'code' and skip.search(c.source)}
    for i, c in kept.items(): nb.cells[i] = nbformat.v4.new_markdown_cell('')
    started = time.time()
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', store_widget_state=True, extra_arguments=['--IPKernelApp.log_level=40'],
                            resources={'metadata': {'path': str(path.parent)}})
    client.execute()
    for i, c in kept.items(): nb.cells[i] = c
    for c in nb.cells:
        if c.cell_type == 'code': c.execution_count = None
    aside = path.with_suffix('.ipynb.tmp')
    nbformat.write(nb, aside)
    os.replace(aside, path)
    print(f'{path.name}: {time.time() - started:.0f} s, {path.stat().st_size / 1e6:.2f} MB')


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='*', type=Path)
    p.add_argument('--timeout', type=int, default=900, help='seconds a cell may take')
    args = p.parse_args()
    os.environ.setdefault('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    os.environ.setdefault('PYTHONWARNINGS', 'ignore')
    paths = [p.resolve() for p in args.notebooks] or sorted((root/'nbs').glob('*.ipynb'))
    for path in paths: execute(path, args.timeout)
    for path in paths: subprocess.run([sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})'], cwd=root, check=True)


if __name__ == '__main__': main()
