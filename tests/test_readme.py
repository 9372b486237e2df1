"What README.md tells a newcomer to type exists and works."
import re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
blocks = re.findall(r'^```(\w+)\n(.*?)^```', (root/'README.md').read_text(encoding='utf-8'), re.M | re.S)
lines = [l.strip() for language, text in blocks if language == 'sh' for l in text.splitlines() if l.strip() and not l.startswith('#')]
here = Path(sys.executable).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')


def command(name): return shutil.which(name, path=str(here)) or shutil.which(name)


def test_it_begins_with_the_two_commands():
    assert lines[:4] == ['make demo', 'make test', "pip install -e '.[dev]'", 'nbdev_test']


def test_commands_exist():
    targets = re.findall(r'^([\w-]+):', (root/'Makefile').read_text(), re.M)
    for line in lines:
        first, *rest = shlex.split(line)
        if first == 'make': assert set(rest) <= set(targets), line
        elif first == 'pip': assert all(f'{e}_requirements' in ini['DEFAULT'] for e in re.findall(r'\w+', line.partition('[')[2].partition(']')[0])), line
        else: assert command(first) or first in ('git', 'cd'), line


def test_own_commands_explain_themselves():
    for name in re.findall(r'(disentangle_\w+)=', ini['DEFAULT']['console_scripts']):
        done = subprocess.run([command(name) or name, '--help'], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and 'usage' in done.stdout.lower(), f'{name} --help: {done.stderr[-1000:]}'


def test_python_blocks_run(tmp_path):
    code = '\n'.join(text for language, text in blocks if language == 'python')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_nbdev_test_succeeds_on_a_notebook():
    done = subprocess.run([command('nbdev_test'), '--path', 'nbs/92_showdoc.ipynb'], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'Success.' in done.stdout, done.stdout + done.stderr[-3000:]
