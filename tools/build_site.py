"""Build the site: nbdev processes the notebooks, this script turns the result into pages for Sphinx, Sphinx writes HTML.
`python tools/build_site.py [_site]`; no request leaves the machine, and any warning is an error."""
import hashlib, html, importlib.metadata as metadata, importlib.util, json, os, re, shutil, subprocess, sys, time, zlib
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
from contents import decades, nbs

proc, pages = root/'_proc', root/'_site_src'
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
base = cfg['doc_host'] + cfg['doc_baseurl'] + '/'
repository = f"{cfg['git_url']}/blob/{cfg['branch']}/"
WIDGET = 'application/vnd.jupyter.widget-view+json'
NOTHING = '', 0, ''
directive = re.compile(r'^#\s*\|\s*([\w-]+)\s*:?\s*(.*)\n?', re.M)


def process():
    "nbdev's own processing: front matter, `show_doc` entries, links, hidden cells; into `_proc/`."
    os.chdir(root)
    from nbdev.doclinks import _build_modidx
    from nbdev.serve import proc_nbs
    _build_modidx()
    try: proc_nbs(force=True, n_workers=int(os.environ.get('WORKERS', 2)))
    except Exception as e: # the reason is in the text of the worker's traceback: its first line that names an error
        reason = re.search(r'^\w*(?:Error|Exception|Interrupt)\b.*', str(e.__cause__ or ''), re.M)
        sys.exit(f'site: {reason[0] if reason else type(e).__name__}\n{e}\n(nbdev runs exported cells and those that import: keep imports in cells of their own)')


def symbols():
    "{page: anchors that links to its names use}, from the index nbdev keeps of the package."
    spec = importlib.util.spec_from_file_location('_modidx', root/cfg['lib_path']/'_modidx.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    found = {}
    for names in mod.d['syms'].values():
        for url, _ in names.values():
            page, _, anchor = url.partition('#')
            found.setdefault(page.rsplit('/', 1)[-1], []).append(anchor)
    return found


def header(nb):
    "Title with promise, and page name, out of nbdev's front matter cell."
    import yaml
    front = yaml.safe_load(''.join(nb['cells'][0]['source']).strip().strip('-'))
    promise = f"\n\n> {front['description']}" if front.get('description') else ''
    return f"# {front['title']}{promise}", front.get('output-file')


def below_title(path):
    "What stands in the title's own cell below title, promise and settings: nbdev takes the cell whole and would lose it."
    from nbdev.doclinks import NbdevLookup
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    src = next((s for c in cells if c['cell_type'] == 'markdown' and (s := ''.join(c['source'])).startswith('# ')), '')
    return NbdevLookup().linkify(re.sub(r'\A# .*\n*((> .*|- [\w-]+: .*)?\n)*', '', src + '\n').strip()) or ''


def markdown(src, names):
    "Quarto's Markdown in MyST's words; links between notebooks become links between pages."
    src = re.sub(r'^::: *\{\.callout-(\w+)[^}]*\}', lambda m: ':::{' + m[1] + '}', src, flags=re.M)
    src = re.sub(r'\]\(([\w.-]+\.ipynb)(#[\w.-]+)?\)', lambda m: '](' + names.get(m[1], m[1]) + (m[2] or '') + ')', src)
    return re.sub(r'\]\(\.\./([\w./-]+)\)', lambda m: f']({repository}{m[1]})', src)


def entry(cell):
    "A `show_doc` cell as (name, line in the source, Markdown); None for other cells."
    if cell['cell_type'] != 'code' or not re.search(r'^show_doc\(', ''.join(cell['source']), re.M): return None
    text = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in cell['outputs']).strip()
    if not text: return NOTHING
    line = re.search(r'#L(\d+)\)\{\.source\}', text)
    return re.search(r'^#+ (\S+)', text, re.M)[1].lower(), int(line[1]) if line else 0, text


def owners(anchors, names):
    "{name shown on the page: anchors to put there}; what has no entry (a class's `forward`, say) goes to its class or to ''."
    at = {}
    for a in sorted(set(anchors) | set(names)):
        own = max((n for n in names if a == n or a.startswith(n + '.')), key=len, default='')
        at.setdefault(own, []).append(a)
    return at


def marks(name, at):
    "Invisible targets of links to `name`; Sphinx makes the plainest ones itself, from the heading."
    wanted = [a for a in at.pop(name, []) if a != name or not re.fullmatch('[a-z][a-z0-9]*', a)]
    return ''.join(f'<a id="{html.escape(a)}"></a>' for a in wanted) + ('\n\n' if wanted else '')


def reference(entries, at):
    "Documented names that follow each other, in the order of the source; site.css knows an entry by its source link."
    named = lambda text: text if '{.source}' in text else text.replace('\n', '\n\n<a class="source"></a>\n', 1)
    return text_cell('\n\n'.join(marks(name, at) + named(text) for name, _, text in sorted(entries, key=lambda e: e[1])))


def text_cell(src): return dict(cell_type='markdown', id=f'{zlib.crc32(src.encode()):08x}', metadata={}, source=src)


def code(cell, widgets):
    "A code cell without directives; what they asked for becomes tags."
    src = ''.join(cell['source'])
    asked = dict(directive.findall(src))
    tags = [tag for key, value, tag in (('echo', 'false', 'remove-input'), ('output', 'false', 'remove-output'),
            ('include', 'false', 'remove-cell'), ('code-fold', 'true', 'hide-input')) if asked.get(key, '').strip() == value]
    outputs = cell['outputs'] if widgets else [o for o in cell['outputs'] if WIDGET not in o.get('data', {})]
    return dict(cell, source=directive.sub('', src).strip('\n'), outputs=outputs, metadata=dict(tags=tags) if tags else {})


def exported_source(cell): return cell['cell_type'] == 'code' and 'code-summary: "Exported source"' in ''.join(cell['source'])


def defines(cell, name): return re.search(rf'^\s*(def|class) {re.escape(name.split(".")[-1])}\b', ''.join(cell['source']), re.M | re.I)


def body(nb, names, anchors, widgets):
    "The cells of a page below its title: entries of one exported cell together and in order, then its source."
    at = owners(anchors, [e[0] for e in map(entry, nb['cells'][1:]) if e and e[0]])
    cells, run, source = [text_cell(marks('', at))], [], []

    def flush():
        if run: cells.append(reference(run, at))
        cells.extend(code(c, widgets) for c in source)
        run.clear(), source.clear()

    for c in nb['cells'][1:]:
        found, src = entry(c), ''.join(c['source'])
        if not src.strip() or src.startswith('<!-- WARNING') or found == NOTHING: continue
        if source and not (found and defines(source[0], found[0])): flush()
        if found: run.append(found)
        elif exported_source(c): source.append(c)
        else:
            flush()
            cells.append(text_cell(markdown(src, names)) if c['cell_type'] == 'markdown' else code(c, widgets))
    flush()
    return cells if cells[0]['source'] else cells[1:]


def toctree(names):
    "The reading order, for the left column and for previous/next."
    trees = [':::{toctree}\n:hidden:\n:caption: ' + decade + '\n\n' + '\n'.join(Path(names[p.name]).stem for p in paths) + '\n:::'
             for decade, paths in decades()]
    return text_cell('\n\n'.join(trees))


def write_pages():
    "`_proc/` to `_site_src/`: one notebook a page, named as nbdev's links expect."
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(root/'docs', pages, ignore=shutil.ignore_patterns('readme'))
    widgets, anchors = (pages/'_static'/'vendor'/'embed-amd.js').exists(), symbols()
    loaded = {p.name: json.loads(p.read_text(encoding='utf-8')) for p in sorted(proc.glob('*.ipynb'))}
    heads = {name: header(nb) for name, nb in loaded.items()}
    names = {name: Path(output or name).stem + '.ipynb' for name, (_, output) in heads.items()}
    for name, nb in loaded.items():
        head = '\n\n'.join([heads[name][0], markdown(below_title(nbs/name), names)]).strip()
        cells = [text_cell(head)] + body(nb, names, anchors.get(names[name].replace('.ipynb', '.html'), []), widgets)
        if name == 'index.ipynb': cells.append(toctree(names))
        if not widgets: nb['metadata'].pop('widgets', None)
        (pages/names[name]).write_text(json.dumps(dict(nb, cells=cells)), encoding='utf-8')
    if (nbs/'images').exists(): shutil.copytree(nbs/'images', pages/'images')
    return widgets, any(WIDGET in json.dumps(nb) for nb in loaded.values())


def mathjax():
    "MathJax out of the docs extra, checked; without it pages show the TeX source and still ask nobody else."
    name = 'tex-svg-full.js'
    to = pages/'_static'/'vendor'/name
    to.parent.mkdir(parents=True, exist_ok=True)
    wanted = dict(reversed(l.split()) for l in (root/'docs'/'_static'/'vendor.sha256').read_text().splitlines())[name]
    try: found = next(f.locate() for f in metadata.files('sphinx-mathjax-offline') if f.name == name)
    except (metadata.PackageNotFoundError, StopIteration):
        print("site: MathJax is not installed, so formulas stay TeX source; pip install -e '.[docs]' brings it")
        return to.write_text('')
    data = Path(found).read_bytes()
    if hashlib.sha256(data).hexdigest() != wanted: sys.exit(f'site: {found} is not the {name} of docs/_static/vendor.sha256')
    to.write_bytes(data)


def sphinx(out):
    "HTML of `_site_src/`, then links to our own address become relative: the site works wherever it lies."
    shutil.rmtree(out, ignore_errors=True)
    cmd = [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', '2', '-d', pages/'.doctrees', pages, out]
    if subprocess.run(cmd).returncode: sys.exit('site: Sphinx had warnings, above; each is an error')
    for p in out.glob('*.html'):
        text = p.read_text(encoding='utf-8')
        p.write_text(text.replace(f'class="reference external" href="{base}', 'class="reference internal" href="').replace(f'href="{base}', 'href="'), encoding='utf-8')
    (out/'.nojekyll').touch()


def main():
    started, out = time.time(), Path(sys.argv[1] if len(sys.argv) > 1 else '_site').resolve()
    process()
    read = time.time()
    widgets, wanted = write_pages()
    if wanted and not widgets: print('site: widgets are left out; sh tools/vendor.sh (needs npm) brings their scripts')
    mathjax()
    sphinx(out)
    print(f'site: {len(list(out.glob("*.html")))} pages in {out.name}/ after {time.time() - started:.0f} s ({read - started:.0f} s nbdev)')


if __name__ == '__main__': main()
