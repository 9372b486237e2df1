"""Write README.md from `nbs/index.ipynb`: text with linked names, code, text outputs, and pictures (saved in docs/readme/).
`--check` changes nothing and fails when README.md would be different."""
import base64, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
hidden = re.compile(r'^#\s*\|\s*(hide|default_exp|include:\s*false)', re.M)
directive = re.compile(r'^#\s*\|.*\n?', re.M)


def to_root(md):
    "Links between notebooks, seen from the root of the repository."
    return re.sub(r'\]\((?!\w+:|#|/|\.\.)([\w./-]+)\)', r'](nbs/\1)', md).replace('](../', '](')


def output_md(out, picture):
    data = out.get('data', {})
    text = ''.join(data.get('text/plain', out.get('text', '')))
    if 'text/markdown' in data: return to_root(''.join(data['text/markdown']))
    if 'image/png' in data: return f'![]({picture(data["image/png"])})'
    if 'text/html' in data and '<audio' in ''.join(data['text/html']): return '*(Sound: on the site and in the notebook.)*'
    return f'```\n{text.rstrip()}\n```' if text.strip() and not text.startswith('<') else ''


def readme(nb, linkify):
    "The text of README.md and its pictures {name: bytes}."
    pictures, parts = {}, []

    def picture(png):
        name = f'docs/readme/{len(pictures) + 1}.png'
        pictures[name] = base64.b64decode(''.join(png))
        return name

    for c in nb['cells']:
        src = ''.join(c['source']).strip()
        if not src or hidden.search(src): continue
        if c['cell_type'] == 'markdown': parts.append(to_root(linkify(src)))
        elif c['cell_type'] == 'code':
            parts.append(f'```python\n{directive.sub("", src).strip()}\n```')
            parts += [o for o in (output_md(o, picture) for o in c['outputs']) if o]
    return '<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->\n\n' + '\n\n'.join(parts) + '\n', pictures


def main():
    from nbdev.doclinks import NbdevLookup
    text, pictures = readme(json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8')), NbdevLookup().linkify)
    files = {'README.md': text.encode(), **pictures}
    stale = [name for name, data in files.items() if not (root/name).exists() or (root/name).read_bytes() != data]
    if '--check' in sys.argv[1:]:
        if stale: print(f'{", ".join(stale)}: not what nbs/index.ipynb says; run python tools/readme.py')
        return bool(stale)
    for name, data in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data)
    for p in (root/'docs'/'readme').glob('*.png'):
        if f'docs/readme/{p.name}' not in files: p.unlink()


if __name__ == '__main__': sys.exit(main())
