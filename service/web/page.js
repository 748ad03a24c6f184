// The page is a client of the API like any other. What comes from the API or the user is shown as text only,
// never as HTML, and all addresses are relative, so that the page works below any root path.

import { ARTIFACTS, facts, nameOf, paceText, shortStatus, sizeText, statusText, timeText } from "./words.js";

const LISTED_JOBS = 10;
const REFRESH_SECONDS = 10; // the list of jobs and the notice about workers
const RETRY_SECONDS = 5; // after the API could not be reached, or told nothing more

const ENDED = ["succeeded", "failed", "canceled"];

const $ = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children); // strings become text nodes
  return made;
}

// -- the API --------------------------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, problem) {
    super(problem?.title ?? "The service answered in a way that this page does not understand");
    this.status = status;
    this.detail = problem?.detail ?? `HTTP status ${status}.`;
  }
}

async function api(path, options = {}) {
  const answer = await fetch(path, { cache: "no-store", ...options });
  if (answer.ok) return answer;
  throw new ApiError(answer.status, await answer.json().catch(() => null));
}

const jobUrl = (id) => `jobs/${encodeURIComponent(id)}`;

function showProblem(box, error) {
  box.hidden = error === null;
  if (error === null) return box.replaceChildren();
  const known = error instanceof ApiError;
  const title = known ? error.message : "The service cannot be reached";
  const detail = known ? error.detail : "Is it running, and is this device connected?";
  box.replaceChildren(element("strong", {}, title), detail);
}

// -- a new video ----------------------------------------------------------------------------------------

let chosen = null; // the File; kept apart from the input, which may not be given a dropped one everywhere
let request = null; // the upload in progress

function choose(file) {
  if (!file || request) return;
  chosen = file;
  $("file").required = false;
  $("file-name").textContent = file.name;
  $("file-note").textContent = `${sizeText(file.size)} · choose another`;
  showProblem($("upload-problem"), null);
  location.hash = "";
}

function send() {
  const form = new FormData();
  form.append("threshold", $("threshold").value);
  form.append("quality", $("quality").value);
  if ($("max-side").value) form.append("max_side", $("max-side").value);
  form.append("artifacts", "masks");
  if ($("overlay").checked) form.append("artifacts", "overlay");
  form.append("video", chosen, chosen.name);

  request = new XMLHttpRequest(); // fetch cannot tell how far an upload is
  request.upload.onprogress = ({ loaded, total }) => {
    $("sending-bar").value = loaded / total;
    $("sending-text").textContent = `Sending: ${sizeText(loaded)} of ${sizeText(total)}`;
  };
  request.upload.onload = () => {
    $("sending-bar").removeAttribute("value");
    $("sending-text").textContent = "Checking the video";
  };
  request.onload = ({ target }) => {
    if (target.status === 202) location.hash = target.response.id;
    else showProblem($("upload-problem"), new ApiError(target.status, target.response));
  };
  request.onerror = () => {
    const detail = "The service cannot be reached, or something on the way takes no file of this size.";
    showProblem($("upload-problem"), new ApiError(0, { title: "The upload broke off", detail }));
  };
  request.onloadend = () => showSending((request = null));
  request.open("POST", "jobs");
  request.responseType = "json";
  showProblem($("upload-problem"), null);
  $("sending-bar").value = 0;
  $("sending-text").textContent = "Sending";
  showSending(request);
  request.send(form);
}

function showSending(sending) {
  $("sending").hidden = !sending;
  $("send").hidden = Boolean(sending);
  $("options").disabled = $("file").disabled = Boolean(sending);
}

// -- the open job ---------------------------------------------------------------------------------------

function showJob(job) {
  const ended = ENDED.includes(job.status);
  document.title = `${nameOf(job)}: ${job.status} – IMCNet`;
  $("job-name").textContent = nameOf(job);
  if ($("job-status").textContent !== job.status) $("job-status").textContent = job.status; // is read aloud
  $("job-status").className = `badge ${job.status}`;
  $("job-text").textContent = statusText(job);
  $("job-bar").hidden = $("job-pace").hidden = job.status !== "running";
  if (job.progress.percent === null) $("job-bar").removeAttribute("value");
  else $("job-bar").value = job.progress.percent;
  $("job-pace").textContent = paceText(job.progress);
  $("job-warnings").replaceChildren(
    ...job.warnings.map(({ detail }) => element("p", { className: "notice" }, detail)),
  );
  showProblem($("job-problem"), job.error && new ApiError(null, job.error));
  const pairs = facts(job).flatMap(([term, fact]) => [element("dt", {}, term), element("dd", {}, fact)]);
  $("job-facts").replaceChildren(...pairs);
  $("job-actions").hidden = false;
  $("cancel").hidden = ended;
  $("cancel").disabled = job.status === "canceling";
  if (job.artifacts.length) showResults(job);
}

function showResults({ id, artifacts, input }) {
  const url = (name) => `${jobUrl(id)}/artifacts/${encodeURIComponent(name)}`;
  $("job-artifacts").hidden = artifacts.length === 0;
  $("job-artifacts").replaceChildren(
    ...artifacts.map(({ name, bytes, sha256 }) => {
      const link = element("a", { href: url(name), download: name, title: `SHA-256 ${sha256}` }, name);
      const words = [ARTIFACTS[name] ?? "", sizeText(bytes)].map((text) => element("span", {}, text));
      return element("li", {}, link, ...words);
    }),
  );
  const overlay = artifacts.find(({ media_type }) => media_type.startsWith("video/"));
  const video = $("overlay-video");
  video.hidden = !overlay;
  video.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (overlay) {
    // Straight from its address: `attachment` is for navigation only, and no long video is held in memory.
    video.src = url(overlay.name);
    video.style.aspectRatio = `${input.width} / ${input.height}`; // no jump when it has loaded
  } else {
    video.removeAttribute("src");
    video.load(); // or the one before plays on
  }
}

function clearJob() {
  for (const id of ["job-name", "job-status", "job-text"]) $(id).textContent = "";
  for (const id of ["job-bar", "job-pace", "job-actions"]) $(id).hidden = true;
  for (const id of ["job-warnings", "job-facts"]) $(id).replaceChildren();
  showProblem($("job-problem"), null);
  showResults({ artifacts: [] });
}

async function follow(id, signal) {
  let status = null;
  const show = (job) => {
    if (signal.aborted) return;
    showJob(job);
    if (job.status !== status) refresh();
    status = job.status;
  };
  while (!signal.aborted) {
    try {
      const job = await (await api(jobUrl(id), { signal })).json(); // an EventSource does not tell what is wrong
      show(job);
      if (!ENDED.includes(status)) await watch(job, signal, show);
      if (ENDED.includes(status)) return;
    } catch (error) {
      if (signal.aborted) return;
      showProblem($("job-problem"), error);
      $("job-name").textContent ||= "Job";
      if (error.status === 404 || error.status === 410) return refresh();
    }
    await pause(RETRY_SECONDS);
  }
}

/** Shows what happens to a job until it has ended or nothing more is to be heard. */
function watch(job, signal, show) {
  return new Promise((resolve) => {
    const events = new EventSource(`${jobUrl(job.id)}/events`);
    const close = () => resolve(events.close());
    const told = (news) => show((job = { ...job, ...news }));
    events.addEventListener("status", ({ data }) => told(JSON.parse(data)));
    events.addEventListener("progress", ({ data }) => told({ progress: JSON.parse(data) }));
    events.addEventListener("end", ({ data }) => {
      told(JSON.parse(data));
      close();
    });
    events.addEventListener("error", close);
    signal.addEventListener("abort", close);
  });
}

// -- the service and its jobs ---------------------------------------------------------------------------

function refresh() {
  const unknown = () => {}; // the next round tries again
  const ask = (path) => api(path).then((answer) => answer.json());
  ask("version").then(showService).catch(unknown);
  ask(`jobs?limit=${LISTED_JOBS}`).then(showJobs).catch(unknown);
}

function showService({ version, workers }) {
  let notice = "";
  if (workers === null) notice = "The job queue cannot be reached: no video can be taken.";
  else if (workers.length === 0) notice = "No worker is running: videos are taken, and wait until one comes.";
  else if (workers.some(({ model }) => !model.trained)) {
    notice = "The network is untrained: its masks mean nothing.";
  }
  if ($("job-warnings").hasChildNodes()) notice = ""; // the open job says it itself
  $("service-notice").hidden = notice === "";
  if ($("service-notice").textContent !== notice) $("service-notice").textContent = notice; // is read aloud
  const devices = workers?.map(({ device }) => device).join(", ");
  $("service-facts").textContent = `IMCNet ${version}${devices ? ` on ${devices}` : ""} ·`;
}

function showJobs({ items }) {
  $("recent").hidden = items.length === 0;
  const focused = $("recent-jobs").contains(document.activeElement) && document.activeElement.hash;
  const entries = items.map(listed);
  $("recent-jobs").replaceChildren(...entries);
  if (focused) entries.find((entry) => entry.firstChild.hash === focused)?.firstChild.focus();
}

function listed(job) {
  const link = element(
    "a",
    { href: `#${job.id}` },
    element("strong", {}, nameOf(job)),
    element("span", { className: `badge ${job.status}` }, shortStatus(job)),
    element("time", { dateTime: job.created_at }, timeText(job.created_at)),
  );
  if (job.id === location.hash.slice(1)) link.ariaCurrent = "page";
  return element("li", {}, link);
}

// -- wiring ---------------------------------------------------------------------------------------------

let following = new AbortController();

function open() {
  following.abort();
  following = new AbortController();
  const id = location.hash.slice(1);
  $("new").hidden = id !== "";
  $("job").hidden = id === "";
  document.title = "IMCNet";
  clearJob();
  if (id) follow(id, following.signal); // refreshes what is around it, too
  else refresh();
}

function onJobButton(button, action) {
  $(button).addEventListener("click", () => {
    action(jobUrl(location.hash.slice(1))).catch((error) => showProblem($("job-problem"), error));
  });
}

onJobButton("cancel", (url) => api(`${url}/cancel`, { method: "POST" }));
onJobButton("delete", async (url) => {
  if (!confirm("Delete the job with everything that belongs to it?")) return;
  await api(url, { method: "DELETE" });
  location.hash = "";
});

$("threshold").addEventListener("input", ({ target }) => {
  $("threshold-value").textContent = Number(target.value).toFixed(2);
});
$("file").addEventListener("change", ({ target }) => choose(target.files[0]));
$("abort").addEventListener("click", () => request?.abort());
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  // On the whole page: a video dropped beside the frame would be opened by the browser instead.
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files[0]);
  });
}
addEventListener("beforeunload", (event) => request && event.preventDefault());
addEventListener("hashchange", () => {
  open();
  $(location.hash.length > 1 ? "job" : "new").focus(); // what had it may be hidden now
});
setInterval(() => document.visibilityState === "visible" && refresh(), 1000 * REFRESH_SECONDS);
open();
