"Rules of the house that a tool can check: import order, light imports, nothing that runs what it reads, nothing too big."
import ast, json, re, subprocess, sys
from pathlib import Path
from statistics import median

import pytest

root = Path(__file__).resolve().parents[1]
nbs, lib = root/'nbs', root/'disentangle_nb'
TEXT = {'.py', '.ipynb', '.md', '.toml', '.ini', '.yml', '.json', '.sh', '.css', '.csv', '.sha256', ''}


def tracked():
    "Files git knows (or would: new ones that it does not ignore)."
    done = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=root, capture_output=True, text=True)
    if done.returncode: pytest.skip('not a git clone')
    return [p for p in (root/f for f in done.stdout.split('\0') if f) if p.is_file()]


def cells(path, kind='code'):
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]


def tree(src):
    "Syntax of a cell, without magics; None for what is not Python."
    try: return ast.parse(re.sub(r'^\s*[%!].*', 'pass', src, flags=re.M))
    except SyntaxError: return None


def sources():
    "(where, syntax) of every piece of Python in the repository."
    for p in tracked():
        if p.suffix == '.py': yield p.relative_to(root), ast.parse(p.read_text(encoding='utf-8'))
        elif p.suffix == '.ipynb': yield from ((p.relative_to(root), t) for t in map(tree, cells(p)) if t)


def imported(t):
    "Dotted names that a piece of Python imports, wherever in it."
    for n in ast.walk(t):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom) and n.module and not n.level: yield from (n.module, *(f'{n.module}.{a.name}' for a in n.names))


def modules():
    "{module: notebook} in reading order."
    found = ((re.search(r'^#\s*\|\s*default_exp\s+(\S+)', '\n'.join(cells(p)), re.M), p) for p in sorted(nbs.glob('*.ipynb')))
    return {m[1]: p for m, p in found if m}


def test_notebooks_import_only_from_lower_numbers():
    of, faults = modules(), []
    for name, path in of.items():
        for t in filter(None, map(tree, cells(path))):
            for i in imported(t):
                other = of.get(i.removeprefix('disentangle_nb.')) if i.startswith('disentangle_nb.') else None
                if other and other.name > path.name: faults.append(f'{path.name} imports from {other.name}')
    assert not faults, '\n'.join(sorted(set(faults)))


def test_imports_have_cells_of_their_own():
    "nbdev runs every cell with an import when it makes the site, and what else stands there needs what it did not run."
    faults = []
    for path in nbs.glob('*.ipynb'):
        for src in (s for s in cells(path) if not re.search(r'^#\s*\|\s*exports?\b|nbdev_export\(\)', s, re.M)):
            top = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in getattr(tree(src), 'body', [])]
            if any(top) and not all(top): faults.append(f'{path.name}: {src.splitlines()[0]}')
    assert not faults, '\n'.join(sorted(faults))


def test_every_module_comes_from_a_notebook():
    of, faults = modules(), []
    for p in lib.rglob('*.py'):
        if p.name in ('__init__.py', '_modidx.py'): continue
        name = '.'.join(p.relative_to(lib).with_suffix('').parts)
        if name not in of or of[name].name not in p.read_text(encoding='utf-8')[:300]: faults.append(name)
    assert not faults, f'no notebook exports {faults}: delete what is left over'


def test_modules_do_without_what_only_tools_need():
    faults = []
    for p in lib.rglob('*.py'):
        if p.name in ('_modidx.py', 'showdoc.py'): continue # the site's renderer, part of the dev extra
        for i in imported(ast.parse(p.read_text(encoding='utf-8'))):
            if re.match(r'(nbdev|execnb|torchvision|fastai\.vision|pytest)(\.|$)', i): faults.append(f'{p.relative_to(root)} imports {i}')
    assert not faults, '\n'.join(sorted(set(faults)))


def seconds(code, runs=5):
    "Median of what `code` prints, each time in a new process."
    def once(): return float(subprocess.run([sys.executable, '-c', f'from time import perf_counter as now\n{code}'], cwd=root,
                                            capture_output=True, text=True, check=True).stdout)
    return median(once() for _ in range(runs))


def test_importing_the_package_is_light():
    assert seconds('t = now(); import disentangle_nb; print(now() - t)') < .3


def test_importing_a_model_costs_little_more_than_torch():
    if not (lib/'models'/'gmvae.py').exists(): pytest.skip('no disentangle_nb.models.gmvae yet')
    assert seconds('import torch; t = now(); import disentangle_nb.models.gmvae; print(now() - t)', runs=3) < .5


def test_no_file_is_big():
    big = [f'{p.relative_to(root)}: {p.stat().st_size / 2**20:.1f} MB' for p in tracked() if p.stat().st_size > 5 * 2**20]
    assert not big, big


def test_no_path_of_one_machine():
    leak = re.compile(r'(?<![\w.:/])/(?:' + '|'.join(('work', 'tmp', 'root', 'home', 'Users', 'farm')) + r')/[\w.-]+')
    faults = {f'{p.relative_to(root)}: {hit}' for p in tracked() if p.suffix in TEXT
              for hit in leak.findall(p.read_text(encoding='utf-8', errors='ignore'))}
    assert not faults, '\n'.join(sorted(faults))


def called(node):
    "The dotted name of what a call calls."
    return ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ''


def runs_what_it_reads(node):
    name, given = called(node), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name == 'torch.load': return given.get('weights_only') != 'True'
    if re.search(r'(^|\.)load$', name): return given.get('allow_pickle') == 'True' or name in ('pickle.load', 'joblib.load', 'dill.load', 'cloudpickle.load')
    return name in ('pickle.loads', 'pickle.Unpickler', 'pd.read_pickle', 'pandas.read_pickle', 'load_learner')


def test_nothing_that_is_read_can_run_code():
    faults = {f'{where}: {ast.unparse(n)}' for where, t in sources() for n in ast.walk(t) if isinstance(n, ast.Call) and runs_what_it_reads(n)}
    assert not faults, '\n'.join(sorted(faults))


def test_functions_and_notebooks_stay_short():
    faults = [f'{p.name}: {n} cells' for p in nbs.glob('*.ipynb') if (n := len(cells(p)) + len(cells(p, 'markdown'))) > 80]
    for p in lib.rglob('*.py'):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and (length := n.end_lineno - n.lineno + 1) > 40:
                faults.append(f'{p.relative_to(root)}: {n.name} has {length} lines')
    assert not faults, '\n'.join(sorted(faults))
