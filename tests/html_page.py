"""A page as its elements, and what every page that leaves a machine must hold to."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "image", "use", "path", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes and text, in order; ids and nesting are checked on the way."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.handle_data(" ")
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        self.text += data
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]

    def assert_self_contained(self, links=()):
        """Nothing is loaded from elsewhere but by following one of `links`, and nothing runs."""
        assert not self.all("script", "iframe", "object", "embed", "base", "form")
        for element in self.elements:
            for name, value in element.items():
                assert not name.startswith("on"), element
                if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                    assert value.startswith(("#", "data:")) or value in links, element
        for style in self.all("style"):
            assert "url(" not in style["text"]
            assert "@import" not in style["text"]
