"Check every link of the built site: files and anchors exist, and no page takes a script, style, image or frame from elsewhere."
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {('script', 'src'), ('img', 'src'), ('iframe', 'src'), ('audio', 'src'), ('source', 'src'), ('video', 'src'), ('link', 'href')}


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.ids, self.links = {''}, []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {v for k, v in attrs.items() if k in ('id', 'name') and v}
        for k in ('href', 'src'):
            if attrs.get(k) and not (tag == 'link' and attrs.get('rel') == 'canonical'): self.links.append((tag, k, attrs[k]))


def wrong(path, page, pages):
    "What is wrong with the links of one page."
    for tag, key, url in page.links:
        part = urlsplit(url)
        if part.scheme == 'data' or part.scheme == 'mailto': continue
        if part.scheme or part.netloc:
            if (tag, key) in LOADS: yield f'{path.name}: <{tag}> loads {url} from outside'
            continue
        to = (path.parent/unquote(part.path)).resolve() if part.path else path.resolve()
        if to.is_dir(): to = to/'index.html'
        if not to.exists(): yield f'{path.name}: {url} leads nowhere'
        elif part.fragment and to in pages and unquote(part.fragment) not in pages[to].ids: yield f'{path.name}: no anchor for {url}'


def main():
    site = Path(sys.argv[1] if len(sys.argv) > 1 else '_site')
    pages = {p.resolve(): Page(p) for p in site.rglob('*.html')}
    if not pages: sys.exit(f'links: no page in {site}')
    faults = sorted({f for path, page in pages.items() for f in wrong(path, page, pages)})
    print('\n'.join(faults) or f'links: {sum(len(p.links) for p in pages.values())} in {len(pages)} pages, none dangles')
    return bool(faults)


if __name__ == '__main__': sys.exit(main())
