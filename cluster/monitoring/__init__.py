"""What Prometheus and Grafana need to watch Wattline: scrape targets, rules, alerts, a dashboard."""
