"""Show reports to people: tables, charts and one interactive page."""
