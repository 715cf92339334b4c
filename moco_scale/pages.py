"""Self-contained HTML pages out of templates; whatever is filled in is escaped."""

import jinja2


def render(template: str, **values: object) -> str:
    """A page of moco_scale/templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moco_scale"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
