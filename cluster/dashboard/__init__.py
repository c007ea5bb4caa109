"""The built-in dashboard: one page, its numbers once a second, nothing from outside this package."""
