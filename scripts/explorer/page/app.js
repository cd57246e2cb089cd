// The page's address says what is shown: #q=SENTENCE, #q=SENTENCE&open=NUMBER, #hard.
import {Detail} from './detail.js'
import {$, ask, drawn, h, number, say} from './dom.js'

const K = 24, WAIT = 250  // results shown; milliseconds without a key before a search, or until an answer is asked for again
let about, shown = null, asking = null

const detail = new Detail({
  step: by => { const at = order().indexOf(state().open) + by; if (order()[at] !== undefined) go({open: order()[at]}) },
  neighbours: () => { const at = order().indexOf(state().open); return [order()[at - 1], order()[at + 1]] },
  search: sentence => { $('sentence').value = sentence; go({q: sentence, open: null}) },
  closed: () => { if (state().open !== null) go({open: null}) },
})

function state() {
  const hash = new URLSearchParams(location.hash.slice(1))
  const open = hash.get('open')
  return {hard: hash.has('hard'), q: hash.get('q') ?? '', open: /^\d+$/.test(open ?? '') ? Number(open) : open}
}

// Change part of the address; typing replaces the entry in the history instead of adding one.
function go(change, replace = false) {
  const next = {...state(), ...change}, hash = new URLSearchParams()
  if (next.hard) hash.set('hard', '')
  if (next.q) hash.set('q', next.q)
  if (next.open !== null) hash.set('open', next.open)
  history[replace ? 'replaceState' : 'pushState'](null, '', '#' + hash)
  show()
}

// The images in the order in which the first model's column shows them, then what only others show.
function order() {
  if (state().hard) return [...document.querySelectorAll('.hard')].map(card => Number(card.dataset.image))
  return shown ? [...new Set(shown.models.flatMap(model => model.results.map(result => result.image)))] : []
}

async function show() {
  const {hard, q} = state()
  $('search-view').hidden = hard
  $('hard-view').hidden = !hard
  $('tab-search').ariaCurrent = hard ? null : 'page'
  $('tab-hard').ariaCurrent = hard ? 'page' : null
  if (hard) showHard()
  else {
    if ($('sentence').value.trim() !== q) $('sentence').value = q
    if (!q || q !== shown?.sentence) await search(q)
  }
  const now = state()  // it may have changed while the search ran
  if (now.open === null) detail.close()
  else detail.open(about, now.open, now.q)
}

// ---- sentence → images

async function search(sentence) {
  asking?.abort()
  if (!sentence) return showNoResults('')
  const mine = asking = new AbortController()
  $('results').classList.add('waiting')
  const started = performance.now()
  try {
    shown = await ask(`api/search?k=${K}&sentence=${encodeURIComponent(sentence)}`, mine.signal)
    $('results').replaceChildren(...shown.models.map(column))
    const seconds = (performance.now() - started) / 1000
    const best = about.indexed ? `The best ${number(about.candidates)} of ` : ''
    say('status', `${best}${number(about.images)} images ranked in ${seconds.toFixed(2)} s. ${marked(shown)}`)
  } catch (error) {
    if (error.name === 'AbortError') return
    showNoResults(error.message, true)
  } finally {
    if (asking === mine) $('results').classList.remove('waiting')
  }
}

function showNoResults(reason, bad) {
  shown = null
  $('results').replaceChildren()
  say('status', reason, bad)
}

function marked({positives}) {
  if (!about.captions) return ''
  if (!positives.length) return 'The sentence is no caption of this split, so no image counts as right.'
  return positives.length === 1 ? 'Its own image is marked.' : `The ${positives.length} images that it describes are marked.`
}

function column(model, i) {
  const place = !model.scored ? 'The model knows none of these words.'
    : model.rank ? `its image at rank ${number(model.rank)} of ${number(model.scored)}`
    : shown.positives.length ? `its image is not among the ${number(model.scored)} that were scored` : ' '
  const unknown = model.tokens.filter(token => !token.known).length
  return h('section', {className: 'model'},
    h('h2', {}, about.models[i].name),
    h('p', {className: 'note'}, place),
    h('p', {className: 'tokens', ariaLabel: 'Words as the model reads them'},
      ...model.tokens.slice(1, -1).map(word),
      unknown ? h('span', {className: 'unknown-note'}, `(${unknown} unknown to the model)`) : ''),
    h('ol', {className: 'cards'}, ...model.results.map((result, rank) => h('li', {}, card(result, rank)))))
}

function word(token) {
  return token.known ? h('span', {}, token.text)
    : h('span', {className: 'unknown', title: 'not in the vocabulary: read as <unk>'}, token.text)
}

function card(result, rank) {
  const button = h('button', {type: 'button', className: result.positive ? 'card positive' : 'card'},
    drawn(result, `Image ${result.id}`),
    h('div', {className: 'text'},
      h('div', {className: 'line'}, h('b', {}, `${rank + 1}`), h('span', {}, result.score.toFixed(3))),
      h('span', {className: 'mark'}, result.positive ? '✓ its image' : ''),
      h('span', {className: 'caption'}, result.caption)))
  button.dataset.image = result.image
  button.onclick = () => go({open: result.image})
  return button
}

// ---- where the models differ

async function showHard() {
  if ($('hard-list').children.length) return
  try {
    const hard = await ask('api/hard')
    if ($('hard-list').children.length) return  // popstate and hashchange both lead here
    if (!hard) {
      setTimeout(showHard, WAIT)
      return say('hard-status', 'Comparing the models on every query …')
    }
    const {cases, images, captions} = hard
    say('hard-status', cases.length ? `Queries whose right answer the models rank most differently, among `
      + `${number(images)} images and ${number(captions)} captions. Lower is better.`
      : 'The models rank the right answer of every query alike.')
    const kinds = [['Sentences that look for their image', cases.filter(entry => entry.sentence)],
                   ['Images that look for one of their captions', cases.filter(entry => !entry.sentence)]]
    $('hard-list').replaceChildren(...kinds.filter(([, list]) => list.length).map(([title, list]) =>
      h('li', {}, h('h2', {}, title), h('ol', {}, ...list.map(hardCase)))))
  } catch (error) { say('hard-status', error.message, true) }
}

function hardCase(entry) {
  const best = Math.min(...entry.ranks)
  const button = h('button', {type: 'button', className: 'hard'},
    drawn(entry, `Image ${entry.id}`),
    h('div', {}, h('div', {}, entry.sentence ? `“${entry.sentence}”` : `Image ${entry.id}: which caption is its own?`),
      h('div', {className: 'ranks'}, ...entry.ranks.map((rank, i) =>
        h('span', {className: rank === best ? 'best' : ''}, `${about.models[i].name} `, h('b', {}, `rank ${number(rank)}`))))))
  button.dataset.image = entry.image
  button.onclick = () => entry.sentence ? go({hard: false, q: entry.sentence}) : go({open: entry.image})
  return h('li', {}, button)
}

// ---- keyboard

function move(event) {
  const cards = [...event.target.closest('.cards')?.querySelectorAll('.card') ?? []]
  const at = cards.indexOf(event.target)
  if (at < 0) return
  const across = cards.findIndex(other => other.offsetTop > cards[0].offsetTop)
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across}[event.key]
  if (step === undefined || !cards[at + step]) return
  cards[at + step].focus()
  event.preventDefault()
}

document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return
  if (event.key === '/' && !$('detail').open && event.target !== $('sentence')) {
    event.preventDefault()
    if (state().hard) go({hard: false})
    $('sentence').focus()
    $('sentence').select()
  } else if (event.target.classList?.contains('card')) move(event)
  else if (event.target === $('sentence') && event.key === 'ArrowDown') document.querySelector('.card')?.focus()
})

// ---- start

let timer
$('sentence').oninput = () => {
  clearTimeout(timer)
  timer = setTimeout(() => go({q: $('sentence').value.trim()}, true), WAIT)
}
$('form').onsubmit = event => {
  event.preventDefault()
  clearTimeout(timer)
  const q = $('sentence').value.trim()
  if (q) go({q})
  else say('status', 'Type a sentence first.', true)
}
let tried = 0
const tryCaption = replace => go({q: about.examples[tried++ % about.examples.length]}, replace)
$('example').onclick = () => tryCaption(false)
addEventListener('popstate', show)
addEventListener('hashchange', show)

try {
  about = await ask('api/about')
  const files = !about.files ? ' No image files: the regions are drawn on a blank frame.'
    : about.files < about.images ? ` Files of ${number(about.files)} images.` : ''
  const captions = about.captions ? `${number(about.captions)} captions` : 'no captions'
  $('about').textContent = `${about.data}, ${about.split}: ${number(about.images)} images, ${captions}.${files}`
  $('tab-hard').hidden = about.models.length < 2 || !about.captions
  $('example').hidden = !about.captions
  document.documentElement.style.setProperty('--models', about.models.length)
  document.documentElement.classList.toggle('one-model', about.models.length === 1)
  if (about.captions && location.hash.length < 2) tryCaption(true)
  else show()
} catch (error) { $('about').textContent = ''; say('status', error.message, true) }
