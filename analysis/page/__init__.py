"""Present reports: tables, charts and one interactive page."""
