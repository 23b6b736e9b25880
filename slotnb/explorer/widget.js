// Rows of canvases that can be clicked and saved; arrow keys move the marked patch; a picture can be opened or dropped.
// Used by `Gallery` in slotnb/explorer/gallery.py.
// Messages to Python: {kind: 'click', key, x, y}, {kind: 'move', dx, dy}, {kind: 'tick'}, {kind: 'ready'} after the first
// pictures, {kind: 'file', id, name, size} with the next part of the file; Python answers each with {kind: 'done'}.

const OPEN = 'open your own picture, or drop it here';
const PART = 4 * 2 ** 20; // bytes of a file in one message; Jupyter's servers refuse messages above 10 MiB

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function make(tag, className, parent) {
  const e = document.createElement(tag);
  e.className = className;
  parent?.append(e);
  return e;
}

// Save a canvas as PNG, enlarged without smoothing.
function save(canvas, file) {
  const scale = Math.max(1, Math.floor(512 / Math.max(canvas.width, canvas.height)));
  const large = make('canvas', '');
  large.width = canvas.width * scale;
  large.height = canvas.height * scale;
  const g = large.getContext('2d');
  g.imageSmoothingEnabled = false;
  g.drawImage(canvas, 0, 0, large.width, large.height);
  large.toBlob((blob) => {
    const a = make('a', '');
    a.href = URL.createObjectURL(blob);
    a.download = file;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10000);
  });
}

// Put the children in this order; those already in place are not touched, so that they keep the focus.
function arrange(parent, children) {
  children.forEach((c, i) => {
    if (parent.children[i] !== c) parent.insertBefore(c, parent.children[i] || null);
  });
}

function render({ model, el }) {
  el.classList.add('slotnb');
  const items = new Map(); // picture key: its elements
  const rows = new Map(); // row heading: its element
  let busy = false; // a message is not answered yet
  let move = [0, 0]; // arrow keys that were pressed while busy, added up
  let turn = 0; // number of the latest draw
  let timer = null;
  let open = null; // button to choose a picture
  let sent = 0; // parts of files that are not answered yet

  function ask(message) {
    busy = true;
    model.send(message);
  }

  function step() {
    if (busy || (!move[0] && !move[1])) return;
    const [dx, dy] = move;
    move = [0, 0];
    ask({ kind: 'move', dx, dy });
  }

  function makeItem(p) {
    const figure = make('figure', 'slotnb-picture');
    const frame = make('div', 'slotnb-frame', figure);
    const canvas = make('canvas', '', frame);
    const mark = make('div', 'slotnb-mark', frame);
    const caption = make('figcaption', '', figure);
    const title = make('span', '', caption);
    const button = make('button', 'slotnb-save', caption);
    const item = { figure, frame, canvas, mark, title, button, p };
    figure.dataset.key = p.key;
    canvas.setAttribute('role', 'img');
    button.textContent = '⤓';
    button.onclick = () => save(canvas, item.p.file);
    frame.onclick = (e) => {
      if (!item.p.mark && !item.p.pick) return;
      const box = canvas.getBoundingClientRect();
      frame.focus();
      const x = (e.clientX - box.left) / box.width;
      const y = (e.clientY - box.top) / box.height;
      ask({ kind: 'click', key: item.p.key, x, y });
    };
    frame.onkeydown = (e) => {
      if (item.p.pick && (e.key === 'Enter' || e.key === ' ')) {
        e.preventDefault();
        ask({ kind: 'click', key: item.p.key, x: 0.5, y: 0.5 });
      } else if (item.p.mark && ARROWS[e.key]) {
        e.preventDefault();
        e.stopPropagation();
        move = [move[0] + ARROWS[e.key][0], move[1] + ARROWS[e.key][1]];
        step();
      }
    };
    return item;
  }

  function update(item, p, bitmap) {
    const { figure, frame, canvas, mark, title, button } = item;
    const active = !!(p.mark || p.pick);
    item.p = p;
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
    canvas.getContext('2d').drawImage(bitmap, 0, 0);
    canvas.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
    canvas.setAttribute('aria-label', p.alt);
    title.textContent = p.title;
    figure.title = p.alt;
    figure.style.setProperty('--size', `${p.size}px`);
    button.hidden = !p.file;
    button.title = `save ${p.file}`;
    button.setAttribute('aria-label', `save ${p.title} as PNG`);
    frame.style.borderColor = p.color || 'transparent';
    frame.classList.toggle('slotnb-active', active);
    frame.classList.toggle('slotnb-chosen', !!p.chosen);
    if (active) {
      frame.tabIndex = 0;
      frame.setAttribute('role', p.pick ? 'button' : 'application');
      frame.setAttribute('aria-label', p.pick ? p.alt : `${p.title}: arrow keys move the patch`);
    } else {
      ['tabindex', 'role', 'aria-label'].forEach((name) => frame.removeAttribute(name));
    }
    mark.hidden = !p.mark;
    ['left', 'top', 'width', 'height'].forEach((side, i) => {
      if (p.mark) mark.style[side] = `${100 * p.mark[i]}%`;
    });
  }

  function rowOf(name) {
    if (!rows.has(name)) {
      const section = make('section', 'slotnb-row', el);
      if (name) make('h4', '', section).textContent = name;
      rows.set(name, make('div', '', section));
    }
    return rows.get(name);
  }

  async function draw() {
    const pictures = model.get('pictures');
    const now = ++turn;
    const decode = (p) => createImageBitmap(new Blob([p.png], { type: 'image/png' }));
    const bitmaps = await Promise.all(pictures.map(decode));
    if (now !== turn) return; // a later draw has started
    const keys = new Set(pictures.map((p) => p.key));
    for (const [key, item] of items) {
      if (!keys.has(key)) {
        item.figure.remove();
        items.delete(key);
      }
    }
    const order = new Map(); // row: its figures
    pictures.forEach((p, i) => {
      if (!items.has(p.key)) items.set(p.key, makeItem(p));
      update(items.get(p.key), p, bitmaps[i]);
      order.set(p.row, [...(order.get(p.row) || []), items.get(p.key).figure]);
    });
    for (const [name, figures] of order) {
      const row = rowOf(name);
      arrange(row, figures);
      row.style.setProperty('--n', figures.length > 5 ? 1 : figures.length);
    }
    for (const [name, row] of rows) row.parentNode.hidden = !order.has(name);
    arrange(el, [...order.keys()].map((name) => rows.get(name).parentNode));
    takeFiles();
    for (const { p, figure } of items.values()) {
      const row = figure.parentNode;
      if (p.chosen) row.scrollLeft = figure.offsetLeft - row.offsetLeft - row.clientWidth / 2;
    }
    el.dataset.drawn = model.get('drawn');
  }

  function answered(message) {
    if (message.kind !== 'done') return;
    busy = false;
    sent = Math.max(0, sent - 1);
    if (open && !sent) open.textContent = OPEN;
    step();
  }

  async function sendFiles(files) {
    for (const file of files) {
      const [id, name, size] = [Math.random(), file.name, file.size];
      let start = 0;
      do {
        const part = size > model.get('largest_file') ? [] : [await file.slice(start, start + PART).arrayBuffer()];
        model.send({ kind: 'file', id, name, size }, undefined, part);
        sent += 1;
        open.textContent = `segmenting ${name} …`;
        start += PART;
      } while (start < Math.min(size, model.get('largest_file')));
    }
  }

  // A button to choose pictures, and the whole explorer as a place to drop them.
  function takeFiles() {
    if (open || !model.get('takes_files')) return;
    model.send({ kind: 'ready' });
    open = make('button', 'slotnb-open', el);
    open.textContent = OPEN;
    const input = make('input', '', el);
    Object.assign(input, { type: 'file', accept: 'image/*,.heic,.heif', multiple: true, hidden: true });
    open.onclick = () => input.click();
    input.onchange = () => sendFiles([...input.files]).then(() => (input.value = ''));
    const zone = el.closest('.slotnb-explorer') || el;
    const mark = (e, on) => {
      if (![...(e.dataTransfer?.types || [])].includes('Files')) return;
      e.preventDefault();
      zone.classList.toggle('slotnb-drop', on);
    };
    zone.addEventListener('dragover', (e) => mark(e, true));
    zone.addEventListener('dragleave', (e) => mark(e, zone.contains(e.relatedTarget)));
    zone.addEventListener('drop', (e) => {
      mark(e, false);
      sendFiles([...e.dataTransfer.files]);
    });
  }

  function writeAddress() {
    const link = model.get('link');
    if (model.get('in_address')) history.replaceState(null, '', link ? `?${link}` : location.pathname);
  }

  function startClock() {
    clearInterval(timer);
    const tick = () => {
      if (!busy) ask({ kind: 'tick' });
    };
    timer = model.get('clock') ? setInterval(tick, model.get('clock')) : null;
  }

  const handlers = {
    'change:drawn': draw,
    'change:link': writeAddress,
    'change:clock': startClock,
    'msg:custom': answered,
  };
  for (const [event, handler] of Object.entries(handlers)) model.on(event, handler);
  draw();
  startClock();
  return () => {
    clearInterval(timer);
    for (const [event, handler] of Object.entries(handlers)) model.off(event, handler);
  };
}

export default { render };
