// The router's events, and what this page remembers of them. A lost stream is dialled again, and says so.

export const MAX_POINTS = 900;
const STALE_MS = 4000;
const REFUSED_RETRY_MS = 10000;

export class Stream {
  constructor({ onChange, onState }) {
    this.series = [];
    this.points = [];
    this.snapshot = null;
    this.onChange = onChange;
    this.onState = onState;
    this.heardAt = 0;
    this.dial();
    setInterval(() => {
      if (this.heardAt && performance.now() - this.heardAt > STALE_MS) this.onState("lost", "reconnecting");
    }, 1000);
  }

  dial() {
    const source = new EventSource("/dash/events");
    source.addEventListener("history", (event) => {
      const { series, points } = JSON.parse(event.data);
      this.series = series;
      this.points = points;
    });
    source.addEventListener("snapshot", (event) => {
      this.heardAt = performance.now();
      this.take(JSON.parse(event.data));
      this.onState("live", "live");
    });
    source.addEventListener("error", () => {
      this.onState("lost", "reconnecting");
      if (source.readyState !== EventSource.CLOSED) return;
      source.close();
      setTimeout(() => this.dial(), REFUSED_RETRY_MS);
    });
  }

  take(snapshot) {
    this.snapshot = snapshot;
    this.points.push(snapshot.point);
    if (this.points.length > MAX_POINTS) this.points.splice(0, this.points.length - MAX_POINTS);
    this.onChange();
  }

  // One array per name, for the model, of the points of the last `seconds`.
  columns(model, names, seconds) {
    const now = this.points.at(-1)?.t ?? 0;
    const points = this.points.filter((point) => now - point.t <= seconds);
    const indices = names.map((name) => this.series.indexOf(name));
    const rows = points.map((point) => point.models[model] ?? []);
    return [points.map((point) => point.t), ...indices.map((index) => rows.map((row) => row[index] ?? null))];
  }

  replicaPower(seconds) {
    const now = this.points.at(-1)?.t ?? 0;
    const points = this.points.filter((point) => now - point.t <= seconds);
    const ids = [...new Set(points.flatMap((point) => Object.keys(point.replicas_w)))].sort();
    const columns = ids.map((id) => points.map((point) => point.replicas_w[id] ?? null));
    return { ids, data: [points.map((point) => point.t), ...columns] };
  }
}
