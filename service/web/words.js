// What the API says, in words: pure functions.

const PHASES = {
  waiting: "Getting started",
  segmenting: "Cutting out the object",
  publishing: "Writing the results",
};

export const ARTIFACTS = {
  "masks.zip": "a black-and-white PNG per frame",
  "overlay.mp4": "the video with the object tinted",
};

export function sizeText(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  const power = Math.min(3, Math.floor(Math.log10(bytes) / 3));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${["", "kB", "MB", "GB"][power]}`;
}

function durationText(seconds) {
  const whole = Math.round(seconds);
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

const countText = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const TIME_FORMAT = { dateStyle: "medium", timeStyle: "short" };
export const timeText = (time) => new Date(time).toLocaleString([], TIME_FORMAT);
export const nameOf = (job) => job.input.filename ?? "Unnamed video";

export function statusText({ status, queue_position, attempt, progress, started_at, finished_at }) {
  if (status === "queued" && queue_position === 1) return "Next in line";
  if (status === "queued" && queue_position) return `Number ${queue_position} in line`;
  if (status === "running") return PHASES[progress.phase] + (attempt > 1 ? `, attempt ${attempt}` : "");
  if (status === "canceling") return "Waiting for the worker to let go of it";
  if (status === "succeeded" && started_at) {
    const seconds = (new Date(finished_at) - new Date(started_at)) / 1000;
    return `${countText(progress.frames_done, "frame")} in ${durationText(seconds)}`;
  }
  return "";
}

export function shortStatus({ status, progress }) {
  const known = status === "running" && progress.percent !== null;
  return known ? `${status} ${Math.floor(progress.percent)} %` : status;
}

export function paceText({ frames_done, frames_total, fps, eta_s }) {
  const frames = countText(frames_total ?? frames_done, "frame");
  const parts = [frames_total === null ? frames : `${frames_done} of ${frames}`];
  if (fps) parts.push(`${fps.toFixed(1)} frames a second`);
  if (eta_s) parts.push(`about ${durationText(Math.ceil(eta_s))} left`);
  return parts.join(" · ");
}

/** What is known of a job, as pairs of term and fact. */
export function facts({ input, options, model, engine, created_at, expires_at }) {
  const parts = [`${input.width} × ${input.height}`, input.codec, sizeText(input.bytes)];
  if (input.fps) parts.splice(1, 0, `${Number(input.fps.toFixed(2))} frames a second`);
  if (input.duration_s) parts.splice(1, 0, durationText(input.duration_s));
  const quality = options.quality === "exact" ? "" : `, ${options.quality.replace("_", "-")}`;
  const side = options.max_side ? `, longest side ${options.max_side} pixels` : "";
  const network = model && `${model.name} (${model.backbone}${model.trained ? "" : ", untrained"})`;
  return [
    ["Video", parts.join(" · ")],
    ["Options", `threshold ${options.threshold}${quality}${side}`],
    ["Network", network],
    ["Computed by", engine && `${engine.name} on ${engine.device}`],
    ["Posted", timeText(created_at)],
    ["Kept until", expires_at && timeText(expires_at)],
  ].filter(([, fact]) => fact);
}
