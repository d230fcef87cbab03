"""Grafana's dashboards as tables of panels; `python -m scripts.make_dashboards` makes their JSON in deploy/grafana."""
