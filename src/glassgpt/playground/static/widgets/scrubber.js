// A slider over the steps of a run, which can also play them one after the other.
import {button, checkbox, count, h, state} from '../core/index.js';

const STEP_MS = 450;

// steps(): the steps, increasing. The selected one is the state's `at`; without it, the newest. shown(): a promise that
// the step is shown, awaited while playing. The element's `update()` follows changes, and `step()` is the shown one.
export function scrubber({steps, shown, signal}) {
  const input = h('input', {type: 'range', min: 0, step: 1, 'aria-label': 'Step', test: 'step-range',
    oninput: () => choose(Number(input.value))});
  const output = h('output', {test: 'step'});
  const previous = button('‹', () => choose(index() - 1), {title: 'Previous step', 'aria-label': 'Previous step'});
  const next = button('›', () => choose(index() + 1), {title: 'Next step', 'aria-label': 'Next step'});
  const play = button('▶', () => (playing ? stop() : start()), {test: 'play'});
  const newest = checkbox({label: 'follow the newest', test: 'follow-newest', checked: true, onInput(isOn) {
    stop();
    state.set({at: isOn ? null : step()});
  }});
  const element = h('div.row.scrubber', {}, play, previous, input, next, output, newest);
  let playing = null;  // aborts to stop
  // The index of the selected step, or of the nearest one before it.
  function index() {
    const all = steps(), wanted = state.number('at');
    return wanted === null ? all.length - 1 : Math.max(0, all.findLastIndex(each => each <= wanted));
  }
  const step = () => steps()[index()] ?? null;
  const select = i => state.set({at: steps()[i]});
  function choose(i) {
    stop();
    select(Math.min(steps().length - 1, Math.max(0, i)));
  }
  function stop() {
    playing?.abort();
    playing = null;
    update();
  }
  async function start() {
    const mine = playing = new AbortController();
    if (index() === steps().length - 1) select(0);
    update();
    for (;;) {
      await Promise.all([shown(), new Promise(resolve => setTimeout(resolve, STEP_MS))]);
      if (mine.signal.aborted || signal.aborted) return;
      if (index() >= steps().length - 1) return stop();
      select(index() + 1);
    }
  }
  function update() {
    const all = steps(), i = index();
    input.max = Math.max(0, all.length - 1);
    input.value = Math.max(0, i);
    input.setAttribute('aria-valuetext', `step ${all[i] ?? 'none'}`);
    output.textContent = all.length ? `step ${count(all[i])} (${i + 1} of ${all.length})` : 'none yet';
    previous.disabled = i <= 0;
    next.disabled = i >= all.length - 1;
    input.disabled = play.disabled = all.length < 2;
    newest.set(state.number('at') === null);
    play.textContent = playing ? '❚❚' : '▶';
    play.title = playing ? 'Stop' : 'Play';
    play.setAttribute('aria-label', play.title);
  }
  signal.addEventListener('abort', () => playing?.abort());
  update();
  return Object.assign(element, {update, step});
}
