// One image and one sentence: who attends to what, the position grid of a region, the image's captions.
import {$, ask, drawn, h, number, percent, say, svg} from './dom.js'

const SIDE = 16, NO_CELL = 256, CAPTIONS = 10, UNIT = 10  // of the grid's squares

export class Detail {
  // page: {step(±1), neighbours(), search(sentence), closed()} of the page around the dialog
  constructor(page) {
    Object.assign(this, {page, image: null, sentence: '', pinned: null})
    $('close').onclick = () => $('detail').close()
    $('previous').onclick = () => page.step(-1)
    $('next').onclick = () => page.step(1)
    $('find').onclick = () => page.search(this.sentence)
    $('detail').onclose = () => { this.image = null; page.closed() }
    $('detail').onclick = event => { if (event.target === $('detail')) $('detail').close() }
    $('detail').onkeydown = event => this.key(event)
    $('region').oninput = () => this.pin(Number($('region').value) ? {region: $('region').value - 1} : null)
  }

  close() { if ($('detail').open) $('detail').close() }

  async open(about, image, query) {
    if (this.image === image && $('detail').open) return
    Object.assign(this, {about, image, pinned: null})
    const [before, after] = this.page.neighbours()
    $('previous').disabled = before === undefined
    $('next').disabled = after === undefined
    if (!$('detail').open) $('detail').showModal()
    say('detail-status', 'Loading …')
    try {
      const shown = await ask(`api/images/${encodeURIComponent(image)}?k=${CAPTIONS}`)
      if (this.image !== image) return
      this.shown = shown
      $('region').max = shown.boxes?.length ?? 0
      $('captions').parentElement.hidden = !about.captions
      const sentence = query || shown.captions[0]
      if (!sentence) throw Error('This split has no captions: type a sentence, and open an image that it finds.')
      await this.read(sentence)
    } catch (error) { this.fail(error) }
  }

  fail(error) {
    this.answer = null
    $('detail').classList.add('failed')
    $('detail-title').textContent = 'Image'
    say('detail-status', error.message, true)
  }

  // Show another sentence on the same image.
  async read(sentence) {
    const image = this.image
    const answer = await ask(`api/images/${image}/attention?sentence=${encodeURIComponent(sentence)}`)
    if (this.image !== image) return
    Object.assign(this, {sentence, answer})
    $('detail').classList.remove('failed')
    $('detail-title').textContent = `${this.shown.id}: “${sentence}”`
    $('views').replaceChildren(...answer.models.map((model, i) => this.view(model, i)))
    $('captions').replaceChildren(...this.shown.models.map((model, i) => this.captionList(model, i)))
    this.pin(null)
  }

  view(model, i) {
    const {name, cross_attn} = this.about.models[i], words = h('div', {className: 'words'})
    const frame = drawn(this.shown, `Image ${this.shown.id}`, true)
    frame.style.aspectRatio = this.shown.aspect
    for (const rect of frame.querySelectorAll('rect')) this.listen(rect, {region: Number(rect.dataset.region)})
    model.tokens.forEach((token, word) => {
      const special = word === 0 || word === model.tokens.length - 1
      const button = h('button', {type: 'button', className: special ? 'word special' : 'word'},
        h('span', {className: token.known ? '' : 'unknown'}, token.text), h('small', {}))
      this.listen(button, {word})
      words.append(button)
    })
    const section = h('section', {className: 'view'}, h('h3', {}, `${name}, score ${model.score.toFixed(3)}`),
      words, frame, h('p', {className: 'note'}, `Trained ${cross_attn === 't2i' ? 'words → regions (t2i)' : 'regions → words (i2t)'}.`))
    section.style.setProperty('--aspect', this.shown.aspect)
    return section
  }

  // Pointing shows, a click keeps; what the keyboard focuses shows, too.
  listen(element, what) {
    element.onpointerenter = event => { if (event.pointerType !== 'touch') this.light(what) }
    element.onpointerleave = () => this.light(this.pinned)
    element.onfocus = () => this.light(what)
    element.onblur = () => this.light(this.pinned)
    element.onclick = () => this.pin(same(what, this.pinned) ? null : what)
  }

  pin(what) {
    this.pinned = what
    $('region').value = what?.region === undefined ? 0 : what.region + 1
    this.light(what)
  }

  light(what) {
    if (!this.answer) return  // what hid with a failure has lost the pointer or the focus
    const {word, region} = what ?? {}
    document.querySelectorAll('#views > .view').forEach((view, i) => {
      const {t2i, i2t} = this.answer.models[i], regions = t2i[word], words = i2t[region]  // one of them, or none
      view.classList.toggle('lit', !!regions)
      for (const rect of view.querySelectorAll('rect')) {
        const share = regions ? regions[rect.dataset.region] / Math.max(...regions) : 0
        rect.style.setProperty('--weight', share.toFixed(3))
        rect.style.setProperty('--heat-stroke', share > .05 ? Math.max(.35, share).toFixed(3) : 0)
        rect.classList.toggle('chosen', Number(rect.dataset.region) === region)
      }
      view.querySelectorAll('.word').forEach((button, at) => {
        button.style.setProperty('--weight', words ? (words[at] / Math.max(...words)).toFixed(3) : 0)
        button.lastChild.textContent = words ? percent(words[at]) : ''
        button.classList.toggle('chosen', at === word)
        button.setAttribute('aria-pressed', same({word: at}, this.pinned))
      })
    })
    $('region-name').textContent = region === undefined ? 'none' : `${region + 1} of ${this.shown.boxes?.length ?? 0}`
    this.grids(region)
    say('detail-status', this.words(word, region))
  }

  // The same in words, for those who do not see the colours.
  words(word, region) {
    if (word === undefined && region === undefined)
      return 'Point at a word to light the regions that it attends to, at a region to light words. A click keeps it.'
    const parts = this.answer.models.map(({t2i, i2t, tokens}, i) => {
      const names = t2i[word]?.map((_, at) => `region ${at + 1}`) ?? tokens.map(token => `“${token.text}”`)
      const top = (t2i[word] ?? i2t[region]).map((weight, at) => ({weight, at})).sort((a, b) => b.weight - a.weight).slice(0, 3)
      return `in ${this.about.models[i].name} to ${top.map(({weight, at}) => `${names[at]} (${percent(weight)})`).join(', ')}`
    })
    const subject = word === undefined ? `Region ${region + 1}` : `“${this.answer.models[0].tokens[word].text}”`
    return `${subject} attends ${parts.join('; ')}`
  }

  // ---- the position grid

  grids(region) {
    const {cells, area, learned} = this.shown, {models} = this.about
    if (!cells) return $('grids').replaceChildren(h('p', {className: 'note'}, 'This data set has no position grids.'))
    const maps = learned.map((weights, i) => [`Learned, ${models[i].name}`, weights]).filter(([, weights]) => weights)
    const others = models.filter(({position}) => position !== 'attention').map(({name, position}) =>
      position === 'area' ? `${name} uses the area weights as they are.` : `${name} does not know positions.`)
    $('grids').replaceChildren(
      ...[['Area weights', area], ...maps].map(([title, weights]) => this.grid(title, cells[region], weights[region])),
      h('p', {className: 'note'}, others.join(' ')))
  }

  grid(title, cells, weights) {
    const lines = Array.from({length: SIDE - 1}, (_, i) => i + 1).flatMap(at => [
      svg('line', {x1: at * UNIT, x2: at * UNIT, y1: 0, y2: SIDE * UNIT}), svg('line', {x1: 0, x2: SIDE * UNIT, y1: at * UNIT, y2: at * UNIT})])
    let note = 'Choose a region.', squares = []
    if (cells) {
      const used = cells.map((cell, slot) => ({cell, weight: weights[slot]})).filter(({cell}) => cell !== NO_CELL)
      const values = used.map(({weight}) => weight), low = Math.min(...values), high = Math.max(...values)
      const empty = weights.reduce((sum, weight) => sum + weight, 0) - values.reduce((sum, weight) => sum + weight, 0)
      squares = used.map(({cell, weight}) => svg('rect', {x: Math.floor(cell / SIDE) * UNIT, y: cell % SIDE * UNIT, width: UNIT, height: UNIT,
        'fill-opacity': (.2 + .75 * (high > low ? (weight - low) / (high - low) : 1)).toFixed(3)}))
      const tenth = share => (100 * share).toFixed(1)
      note = used.length ? `${tenth(low)} % (pale) to ${tenth(high)} % in ${used.length} cells`
        + (empty > .0005 ? `, ${tenth(empty)} % on ${cells.length - used.length} empty slots` : '') : 'No cell: the region has no area.'
    }
    const map = h('div', {className: 'map'})
    if (this.shown.file) map.append(h('img', {src: `images/${this.shown.image}`, alt: ''}))
    map.append(svg('svg', {viewBox: `0 0 ${SIDE * UNIT} ${SIDE * UNIT}`, role: 'img', 'aria-label': `${title}: ${note}`}, ...squares, ...lines))
    return h('div', {className: 'grid'}, h('h4', {}, title), map, h('p', {className: 'note'}, note))
  }

  // ---- image → captions

  captionList(model, i) {
    const place = model.rank ? `its own caption first at rank ${number(model.rank)} of ${number(model.scored)}`
      : `its own captions are not among the ${number(model.scored)} that were scored`
    return h('section', {className: 'model'}, h('h3', {}, this.about.models[i].name), h('p', {className: 'note'}, place),
      h('ol', {}, ...model.results.map((result, rank) => {
        const button = h('button', {type: 'button', className: result.positive ? 'positive' : ''},
          h('b', {}, `${rank + 1}`), h('span', {}, result.score.toFixed(3)),
          h('span', {}, result.text, result.positive ? h('i', {}, ' ✓ its own') : ''))
        button.classList.toggle('now', result.text === this.sentence)
        button.onclick = () => this.read(result.text).then(() => $('detail').scrollTo({top: 0}), error => this.fail(error))
        return h('li', {}, button)
      })))
  }

  // ---- keyboard

  key(event) {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key]
    if (!step || event.target === $('region') || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    if (!event.target.classList.contains('word')) return this.page.step(step)
    const words = [...event.target.parentElement.children]
    words[words.indexOf(event.target) + step]?.focus()
  }
}

function same(a, b) { return !!a && !!b && a.word === b.word && a.region === b.region }
