"""A page's section that a command writes."""


def with_section(page: str, text: str, begin: str, end: str) -> str:
    """Return the page with the text between its two marks.

    Raises:
        ValueError: the page lacks one of them.
    """
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page lacks {begin.strip()} or {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
