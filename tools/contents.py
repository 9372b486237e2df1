"""Write what is made from the list of notebooks: `nbs/sidebar.yml` (pages by decade, in reading order), `nbs/nbdev.yml`
and the map of notebooks in `nbs/index.ipynb` (the cell that starts with `## The map`)."""
import json
from pathlib import Path

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'
DECADES = ['Foundations', 'Data', 'Features', 'Models', 'Losses', 'Training', 'Evaluation', 'Synthesis', 'Studies', 'Use']


def decades():
    "(name, notebooks) of every decade that has notebooks."
    found = sorted(p for p in nbs.glob('*.ipynb') if p.name[0].isdigit())
    grouped = [(name, [p for p in found if int(p.name[0]) == i]) for i, name in enumerate(DECADES)]
    return [(name, paths) for name, paths in grouped if paths]


def title(path):
    "Title and promise of a notebook: its first heading and the quote below it."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    lines = [l for c in cells if c['cell_type'] == 'markdown' for l in ''.join(c['source']).splitlines()]
    head = next((l[2:].strip() for l in lines if l.startswith('# ')), path.stem)
    return head, next((l[2:].strip() for l in lines if l.startswith('> ')), '')


def sidebar_yml():
    lines = ['website:', '  sidebar:', '    contents:', '      - index.ipynb']
    for name, paths in decades():
        lines += [f'      - section: {name}', '        contents:', *(f'          - {p.name}' for p in paths)]
    return '\n'.join(lines) + '\n'


def map_md():
    lines = ['## The map', '', 'Numbers are reading order and import order: a notebook imports only from lower ones.']
    for name, paths in decades():
        lines += ['', f'**{name}**', '']
        for p in paths:
            head, promise = title(p)
            lines.append(f'- [{head}]({p.name}): {promise}' if promise else f'- [{head}]({p.name})')
    return '\n'.join(lines)


def write_map(path=nbs/'index.ipynb'):
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'markdown' and ''.join(c['source']).startswith('## The map'): c['source'] = map_md().splitlines(keepends=True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


def main():
    from nbdev.quarto import refresh_quarto_yml
    (nbs/'sidebar.yml').write_text(sidebar_yml(), encoding='utf-8')
    refresh_quarto_yml()
    write_map()


if __name__ == '__main__': main()
