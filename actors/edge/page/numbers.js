// Numbers as people read them.

/** 0.0123 -> "12 ms", 3.2 -> "3.20 s", 75 -> "1 min 15 s". */
export function duration(seconds) {
  if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const days = Math.floor(whole / 86400);
  const hours = Math.floor(whole / 3600) % 24;
  const minutes = Math.floor(whole / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return `${minutes} min ${whole % 60} s`;
}

/** 1536 -> "1.5 KiB". */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  let value = count;
  while (value >= 1023.5 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${power === 0 || value >= 99.95 ? Math.round(value) : value.toFixed(1)} ${units[power]}`;
}

/** 1234567 -> "1,234,567" or as the reader's language has it. */
export function whole(count) {
  return Math.round(count).toLocaleString();
}

/** A rate with as many digits as mean something: 0.04, 3.2, 412. */
export function rate(value) {
  if (value >= 99.5) return whole(value);
  return value.toFixed(value >= 9.95 || value === 0 ? 1 : 2).replace(/\.?0+$/, "") || "0";
}

/** 0.4567 -> "46%". */
export function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1%";
  return `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`;
}

/** "1 picture", "2 pictures". */
export function count(number, what) {
  return `${whole(number)} ${what}${number === 1 ? "" : "s"}`;
}
