"""A plugin for a host that does not exist yet."""

ZOO_API = 2
